"""What a forward pass changes: the pass at w does, and the pass at w + epsilon begins from the same state."""

import copy
import functools
import weakref

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel

from fairseq_asam import Perturbation, TwoPasses

from . import plain_epsilon
from .test_two_passes import (
    STATEFUL,
    assert_same,
    batch,
    buffers,
    forward_and_backward,
    network,
    seed,
    two_passes_of,
)


@pytest.mark.parametrize("known", [True, False], ids=["modules given", "modules that run"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_the_buffers_are_those_that_the_pass_at_w_leaves(kind, known):
    model, plain = network(kind), network(kind)
    tensors = dict(model.named_buffers())
    two_passes = two_passes_of(model, known=known)
    for step in range(2):
        seed()
        two_passes(forward_and_backward(model, batch(step)))
        assert two_passes.sharpness > 0
        seed()
        plain(batch(step))
        assert_same(buffers(model), buffers(plain))
    if kind != "buffer made anew":
        assert all(buffer is tensors[name] for name, buffer in model.named_buffers())
    assert not _global_forward_pre_hooks


def test_an_evaluating_layer_evaluates():
    model = network("batch normalization")
    model(batch())
    model.eval()
    before = buffers(model)
    two_passes_of(model)(forward_and_backward(model, batch()))
    assert_same(buffers(model), before)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3).double()


class Memory(Layer):
    """A buffer that is None at first, or in every second pass."""

    def __init__(self, forgets=False):
        super().__init__()
        self.forgets = forgets
        self.register_buffer("memory", None)

    def forward(self, x):
        hidden, memory = self.linear(x), self.memory
        self.memory = None if self.forgets and memory is not None else hidden.detach().mean(0)
        return hidden if memory is None else hidden + memory


class NewMemory(Layer):
    """A buffer that the first pass registers, and later ones change."""

    def forward(self, x):
        hidden = self.linear(x)
        if not hasattr(self, "memory"):
            self.register_buffer("memory", hidden.detach().mean(0))
            return hidden
        self.memory.mul_(0.5)
        return hidden * self.memory


class Queue(Layer):
    """A buffer that grows: in place, or as another tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("queue", torch.zeros(1, 3).double())

    def forward(self, x):
        hidden = self.linear(x)
        out, queue = hidden - self.queue.mean(0), torch.cat([self.queue, hidden.detach()])
        if self.in_place:
            self.queue.resize_(queue.shape).copy_(queue)
        else:
            self.queue = queue
        return out


class AnotherType(Layer):
    """A buffer that gets another dtype."""

    def __init__(self):
        super().__init__()
        self.register_buffer("memory", torch.zeros(3))

    def forward(self, x):
        hidden = self.linear(x)
        out = hidden - self.memory
        self.memory.data = hidden.detach().mean(0)
        return out


class MomentumEncoder(Layer):
    """Frozen weights that follow the trained ones in each forward pass."""

    def __init__(self, how):
        super().__init__()
        self.how, self.key = how, nn.Linear(5, 3).double().requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for key, query in zip(self.key.parameters(), self.linear.parameters()):
                if self.how == "in place":
                    key.lerp_(query, 0.1)
                elif self.how == "through .data":
                    key.data.mul_(0.9).add_(query.data, alpha=0.1)
                else:
                    key.data = key.data * 0.9 + query.data * 0.1
        return self.linear(x) - self.key(x.flip(0))


class EqualEncoder(Layer):
    """Frozen weights that begin as equals of the trained ones, some of which are beside buffers (MoCo)."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.query = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.linear = None

    def forward(self, x):
        with torch.no_grad():
            for key, query in zip(self.key.parameters(), self.query.parameters()):
                if self.how == "in place":
                    key.lerp_(query, 0.1)
                else:
                    key.data.mul_(0.9).add_(query.data, alpha=0.1)
        return self.query(x) - self.key(x.flip(0))


class Table(Layer):
    """A buffer that is made anew for longer inputs, and an attribute that says for which."""

    def __init__(self):
        super().__init__()
        self.length, self.factors = 0, None
        self.register_buffer("table", torch.zeros(1).double())

    def forward(self, x):
        length = int(x.abs().sum()) % 7 + 1
        if length != self.length:
            self.length, self.table = length, torch.linspace(0, 1, length).double()
            self.factors = self.table.cos()
        return self.linear(x) * self.factors.sum() + self.table.mean()


class SetByTheFirstBatch(Layer):
    """Data-dependent initialization, as ActNorm's."""

    def __init__(self, how, flag):
        super().__init__()
        self.how, self.flag = how, flag
        self.scaled = nn.Module() if flag == "buffer of the parent" else self
        self.scaled.scale = nn.Parameter(torch.ones(3).double())
        self.register_buffer("done", None if flag == "buffer that is None" else torch.tensor(0))
        self.is_done = False

    def forward(self, x):
        hidden = self.linear(x)
        if not (self.is_done if self.flag == "attribute" else self.done):
            with torch.no_grad():
                scale = 1 / hidden.std(0)
                if self.how == "in place":
                    self.scaled.scale.copy_(scale)
                else:
                    self.scaled.scale.data.copy_(scale)
                self.done = torch.tensor(1) if self.done is None else self.done.add_(1)
                self.is_done = True
        return hidden * self.scaled.scale


class Bounded(Layer):
    """Trained weights that every forward pass scales down, next to power iterations."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 5, max_norm=0.5).double()
        self.norm = spectral_norm(nn.Linear(3, 3).double())

    def forward(self, x):
        words = x[:, 0].abs().mul(3).long().clamp(0, 9)
        return self.norm(self.linear(self.words(words)))


class OfLengthOne(Layer):
    """A trained weight that every forward pass scales, in a module with a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3).double())
        self.register_buffer("length", torch.tensor(1.0).double())

    def forward(self, x):
        with torch.no_grad():
            self.scale.mul_(self.length / self.scale.norm())
        return self.linear(x) * self.scale


class Turning(Layer):
    """A flag that every pass turns, on top of *layer*, and on which the output depends."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.register_buffer("flag", torch.tensor(1.0).double())

    def forward(self, x):
        hidden = self.layer(x) * (1 + self.flag)
        self.flag.copy_(1 - self.flag)
        return hidden


CHANGING = {
    "a buffer that is None at first": Memory,
    "a buffer that is None in every second pass": lambda: Memory(forgets=True),
    "a buffer registered by the first pass": NewMemory,
    "a buffer that grows in place": lambda: Queue(in_place=True),
    "a buffer that grows": lambda: Queue(in_place=False),
    "a buffer of another dtype": AnotherType,
    "frozen weights moved in place": lambda: MomentumEncoder("in place"),
    "frozen weights moved through .data": lambda: MomentumEncoder("through .data"),
    "frozen weights in new memory": lambda: MomentumEncoder("in new memory"),
    "frozen weights, equal at first, moved in place": lambda: EqualEncoder("in place"),
    "frozen weights, equal at first, moved through .data": lambda: EqualEncoder("through .data"),
    "a buffer and an attribute about it": Table,
    "weights bounded in each pass": Bounded,
    "a flag that goes up and down": lambda: Turning(nn.Linear(5, 3).double()),
    "a flag beside weights scaled in each pass": lambda: Turning(OfLengthOne()),
}
for how in ("in place", "through .data"):
    for flag in ("buffer", "buffer that is None", "attribute", "buffer of the parent"):
        if (how, flag) != ("through .data", "buffer of the parent"):  # nothing tells of that
            CHANGING[f"weights set {how} by the first batch, flag: {flag}"] = functools.partial(
                SetByTheFirstBatch, how, flag
            )


def state(model):
    """All weights and buffers, None too."""
    tensors = {name: w.detach().clone() for name, w in model.named_parameters()}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            tensors[f"{path}.{name}"] = None if buffer is None else buffer.clone()
    return tensors


def both_passes_by_hand(model, inputs):
    """The model after the pass at w, and one that has made the pass at w + epsilon from the same state."""
    at_w, perturbed = copy.deepcopy(model), copy.deepcopy(model)
    at_w.zero_grad()
    forward_and_backward(at_w, inputs)()
    g = {name: w.grad.numpy() for name, w in at_w.named_parameters() if w.grad is not None}
    w = {name: weight.detach().numpy() for name, weight in at_w.named_parameters() if name in g}
    epsilon = plain_epsilon.epsilon(w, g, rho=0.5, eta=0.01, p=2.0, normalization="element-wise")
    if isinstance(model, SetByTheFirstBatch):  # it begins when the weights are set
        perturbed = copy.deepcopy(at_w)
    perturbed.zero_grad()
    for name, weight in perturbed.named_parameters():
        if name in g:
            weight.data = torch.tensor(w[name] + epsilon[name])
    forward_and_backward(perturbed, inputs)()
    return at_w, perturbed


@pytest.mark.parametrize("known", [True, False], ids=["modules given", "modules that run"])
@pytest.mark.parametrize("kind", CHANGING)
def test_both_passes_begin_from_one_state_and_the_model_ends_as_after_the_pass_at_w(kind, known):
    torch.manual_seed(0)
    model = CHANGING[kind]()
    two_passes = two_passes_of(model, known=known)
    for step in range(3):
        model.zero_grad()
        at_w, perturbed = both_passes_by_hand(model, batch(step))
        two_passes(forward_and_backward(model, batch(step)))
        for weight, expected in zip(model.parameters(), perturbed.parameters()):
            assert (weight.grad is None) == (expected.grad is None)
            if weight.grad is not None:
                torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-11, atol=1e-14)
        left, expected = state(model), state(at_w)
        assert left.keys() == expected.keys()
        for name, tensor in left.items():
            assert tensor is expected[name] if tensor is None else torch.equal(tensor, expected[name])
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.sub_(weight.grad, alpha=0.1)


def moving_key(model, when):
    """A function that scales the frozen weights in the passes for which *when* of their number is true."""
    calls = []

    def evaluate():
        calls.append(None)
        if when(len(calls)):
            with torch.no_grad():
                model.key.weight.mul_(0.9)
        loss = model.linear(batch()).square().mean()
        loss.backward()
        return loss

    return evaluate


def test_a_frozen_weight_too_large_to_copy_is_refused_when_the_pass_at_w_moves_it():
    model = MomentumEncoder("in place")
    model.key = nn.Linear(5, 300).double().requires_grad_(False)
    two_passes, before = two_passes_of(model), state(model)
    with pytest.raises(RuntimeError, match=r"weight of Linear\) of which no copy was made.*as buffers"):
        two_passes(moving_key(model, when=lambda call: True))
    assert torch.equal(model.linear.weight, before["linear.weight"])


def test_a_frozen_weight_that_a_later_update_moves_is_copied_from_then_on():
    """Also if it gets new memory, which no version counter tells of."""
    for in_place in (True, False):
        torch.manual_seed(0)
        model, calls = MomentumEncoder("in place"), []
        two_passes = two_passes_of(model)

        def evaluate(model=model, calls=calls, in_place=in_place):
            calls.append(None)
            if len(calls) > 2:
                with torch.no_grad():
                    if in_place:
                        model.key.weight.mul_(0.5)
                    else:
                        model.key.weight.data = model.key.weight.data * 0.5
            loss = (model.linear(batch()) - model.key(batch())).square().mean()
            loss.backward()
            return loss

        two_passes(evaluate)
        with pytest.raises(RuntimeError, match="of which no copy was made"):
            two_passes(evaluate)
        before = model.key.weight.clone()
        two_passes(evaluate)
        assert torch.equal(model.key.weight, before * 0.5)


def test_a_frozen_weight_that_only_the_second_pass_moves_is_refused():
    model = MomentumEncoder("in place")
    with pytest.raises(RuntimeError, match=r"w \+ epsilon changed weights \(weight of Linear\)"):
        two_passes_of(model)(moving_key(model, when=lambda call: call == 2))


def test_frozen_weights_that_stand_still_are_copied_in_the_first_update_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(5, 50), nn.Linear(50, 5)).double()
    model[1].requires_grad_(False)
    two_passes, copied, clone = two_passes_of(model), [], torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda t, **options: copied.append(t.shape) or clone(t, **options)
    )
    two_passes(forward_and_backward(model, batch(1)))
    assert (5, 50) in copied
    copied.clear()
    two_passes(forward_and_backward(model, batch(2)))
    assert not copied


def test_frozen_weights_that_have_been_replaced_are_let_go():
    """Not at once, but no more of them are kept than there are weights."""
    model, made = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3)).double(), []
    two_passes = two_passes_of(model)
    for _ in range(5):
        model[1] = nn.Linear(3, 3).double().requires_grad_(False)
        made.append(weakref.ref(model[1].weight))
        two_passes(forward_and_backward(model, batch()))
    assert made[0]() is None


def test_copies_of_frozen_weights_take_no_more_memory_than_those_of_perturbed_ones(monkeypatch):
    model = nn.Sequential(
        nn.Linear(5, 4), *(nn.Linear(4, 4, bias=False).requires_grad_(False) for _ in range(9))
    )
    two_passes, copied, clone = two_passes_of(model.double()), [], torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda t, **options: copied.append(t.nbytes) or clone(t, **options)
    )
    two_passes(forward_and_backward(model, batch()))
    assert 0 < sum(copied) <= sum(weight.nbytes for weight in model[0].parameters())


@pytest.mark.parametrize("observer", ["MinMaxObserver", "PerChannelMinMaxObserver", "HistogramObserver"])
def test_quantization_observers(observer):
    """Their buffers get their shape in the first forward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    of_weights = quantization.FakeQuantize.with_args(
        observer=getattr(quantization, observer), dtype=torch.qint8, quant_min=-128, quant_max=127
    )
    if observer == "PerChannelMinMaxObserver":
        of_weights = of_weights.with_args(qscheme=torch.per_channel_symmetric)
    model.qconfig = quantization.QConfig(quantization.default_fake_quant, of_weights)
    quantization.prepare_qat(model.train(), inplace=True)
    plain, two_passes = copy.deepcopy(model), two_passes_of(model)
    for step in range(3):
        two_passes(forward_and_backward(model, batch(step).float()))
        plain(batch(step).float())
        assert_same(buffers(model), buffers(plain))
        assert two_passes.sharpness > 0


@pytest.mark.parametrize("known", [True, False])
def test_a_pass_at_w_that_raises_leaves_buffers_and_moving_weights_as_they_were(known):
    class Fails(nn.Module):
        def forward(self, x):
            raise MemoryError

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(5).double(), MomentumEncoder("in place"), Memory())
    model[2].linear = nn.Linear(3, 3).double()
    two_passes = two_passes_of(model, known=known)
    two_passes(forward_and_backward(model, batch()))
    model.append(Fails())
    before = state(model)
    for step in range(2):
        with pytest.raises(MemoryError):
            two_passes.at_w(forward_and_backward(model, batch(step)))
        after = state(model)
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def test_the_state_of_a_criterion_beside_the_modules():
    class Centered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.zeros(3).double())

        def forward(self, outputs):
            centered = outputs - self.center
            self.center = 0.9 * self.center + 0.1 * outputs.detach().mean(0)
            return centered

    model, criterion = Layer().linear, Centered()
    both = nn.Sequential(model, criterion)
    two_passes = two_passes_of(model)

    def evaluate(inputs):
        loss = criterion(model(inputs)).square().mean()
        loss.backward()
        return loss

    for step in range(3):
        both.zero_grad()
        at_w, perturbed = both_passes_by_hand(both, batch(step))
        two_passes(evaluate, batch(step))
        torch.testing.assert_close(model.weight.grad, perturbed[0].weight.grad, rtol=1e-11, atol=1e-14)
        assert_same(buffers(both), buffers(at_w))


def test_accumulated_passes_move_frozen_weights_once_each():
    torch.manual_seed(0)
    model = MomentumEncoder("in place")
    plain = copy.deepcopy(model)
    two_passes = TwoPasses(Perturbation(model.named_parameters(), rho=0.5), [model])
    for step in range(3):
        two_passes.at_w(forward_and_backward(model, batch(step)))
        plain(batch(step))
    two_passes.at_w_plus_epsilon()
    assert_same(state(model), state(plain))


def test_a_teacher_that_may_get_gradients_moves_once_in_each_update():
    """As torch's AveragedModel, whose weights require gradients. Both passes begin from the same teacher."""
    model = network("dropout").eval()
    teacher = AveragedModel(model, avg_fn=lambda average, new, number: 0.5 * average + 0.5 * new)
    teacher(batch())
    two_passes = two_passes_of(model)

    def loss_of(student, teacher_of, inputs):
        with torch.no_grad():
            target = teacher_of(inputs)
        return (student(inputs) - target + 0.1).square().mean()

    def evaluate(inputs):
        teacher.update_parameters(model)
        loss = loss_of(model, teacher, inputs)
        loss.backward()
        return loss

    for step in range(4):
        student, average = copy.deepcopy(model), copy.deepcopy(teacher)
        model.zero_grad()
        student.zero_grad()
        two_passes(evaluate, batch(step))
        at_w = copy.deepcopy(average)
        at_w.update_parameters(student)
        loss_of(student, at_w, batch(step)).backward()
        weights = {name: w.detach().numpy().copy() for name, w in student.named_parameters()}
        g = {name: w.grad.numpy() for name, w in student.named_parameters()}
        epsilon = plain_epsilon.epsilon(weights, g, rho=0.5, eta=0.01, p=2.0, normalization="element-wise")
        student.zero_grad()
        with torch.no_grad():
            for name, weight in student.named_parameters():
                weight += torch.tensor(epsilon[name])
        average.update_parameters(student)
        loss_of(student, average, batch(step)).backward()
        assert all(map(torch.equal, teacher.module.parameters(), at_w.module.parameters()))
        if step > 0:  # The first update may be an initialization, which the pass at w + epsilon takes over.
            for weight, expected in zip(model.parameters(), student.parameters()):
                torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-11, atol=1e-14)
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad


UNUSUAL = {
    "expanded": lambda: torch.ones(1).expand(5),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse in rows": lambda: torch.eye(3).to_sparse_csr(),
    "conjugate": lambda: torch.ones(3, dtype=torch.cfloat).conj(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


def test_a_buffer_of_one_number_may_have_any_stride():
    """As one number that was expanded to a vector of one. It is restored as others are."""
    model = Queue(in_place=False)
    model.queue = torch.tensor(0.0).double().expand(1)

    def count(inputs):
        model.queue.add_(1.0)
        loss = model.linear(inputs).mul(model.queue).square().mean()
        loss.backward()
        return loss

    two_passes = two_passes_of(model)
    for step in range(3):
        two_passes(count, batch(step))
        assert model.queue.stride() == (0,) and model.queue.item() == step + 1


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested", "ignore:torch.quantize")
@pytest.mark.parametrize("is_buffer", [True, False], ids=["buffer", "frozen weight"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_tensors_of_unusual_memory_stand_by(kind, is_buffer):
    model, tensor = network("dropout"), UNUSUAL[kind]()
    if is_buffer:
        model.register_buffer("beside", tensor)
    else:
        model.beside = nn.Parameter(tensor, requires_grad=False)
    two_passes = two_passes_of(model)
    for _ in range(2):
        two_passes(lambda: forward_and_backward(lambda x: model[3](model[2](model[0](x))), batch())())
        assert two_passes.sharpness > 0
