"""TwoPasses: Algorithm 1, and what both passes have in common."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached, register_parametrization
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_asam import Perturbation, TwoPasses
from fairseq_asam.sharpness import two_passes as two_passes_module
from fairseq_asam.sharpness.directions import Random

from . import plain_epsilon

DEFAULT_RNG = np.random.default_rng


class OwnStatistics(nn.BatchNorm1d):
    """Updates its running statistics itself, as synchronized batch normalizations do."""

    def forward(self, x):
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(x.mean(0), 0.1)
        return (x - x.mean(0)) * self.weight + self.bias


class NewBuffer(nn.Module):
    """Counts in a buffer that is another tensor after each pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x


class FreshGenerator(nn.Module):
    """Draws a mask from a generator made for it, as wav2vec does."""

    def forward(self, x):
        return x * torch.tensor(np.random.default_rng(None).random(x.shape) < 0.5)


class NumpyMask(nn.Module):
    def forward(self, x):
        return x * torch.tensor(np.random.random(x.shape) < 0.5)


def channels(layer):
    """A layer that expects (N, features, length)."""
    return nn.Sequential(nn.Unflatten(1, (2, 4)), layer, nn.Flatten())


STATEFUL = {
    "batch normalization": lambda: nn.BatchNorm1d(8),
    "cumulative batch normalization": lambda: nn.BatchNorm1d(8, momentum=None),
    "batch normalization of another make": lambda: OwnStatistics(8),
    "scripted batch normalization": lambda: torch.jit.script(nn.BatchNorm1d(8)),
    "instance normalization": lambda: channels(nn.InstanceNorm1d(2, track_running_stats=True)),
    "spectral norm": lambda: spectral_norm(nn.Linear(8, 8)),
    "buffer made anew": NewBuffer,
    "dropout": lambda: nn.Dropout(0.5),
    "numpy's generator": NumpyMask,
    "fresh generators": FreshGenerator,
}


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), STATEFUL[kind](), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(seed=1, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, dtype=torch.float64, generator=generator)


def forward_and_backward(model, inputs):
    def evaluate():
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    return evaluate


def two_passes_of(model, rho=0.5, known=True, **options):
    return TwoPasses(Perturbation(model.named_parameters(), rho), [model] if known else (), **options)


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def gradients(model):
    return {name: w.grad.clone() for name, w in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def seed():
    torch.manual_seed(5)
    np.random.seed(5)


@pytest.mark.parametrize("known", [True, False], ids=["modules given", "modules that run"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_at_rho_zero_both_passes_are_one(kind, known):
    """The loss is the same to the bit; gradient and buffers are those of one plain pass."""
    model, plain = network(kind), network(kind)
    two_passes = two_passes_of(model, rho=0.0, known=known)
    for step in range(2):
        seed()
        two_passes(forward_and_backward(model, batch(step)))
        assert two_passes.sharpness == 0.0
        if kind == "fresh generators":  # which differ in every pass but these two
            continue
        seed()
        forward_and_backward(plain, batch(step))()
        assert_same(gradients(model), gradients(plain))
        assert_same(buffers(model), buffers(plain))
        model.zero_grad()
        plain.zero_grad()


def test_buffers_of_both_passes_on_request():
    model, plain = network("batch normalization"), network("batch normalization")
    two_passes_of(model, buffers_of_both=True)(forward_and_backward(model, batch()))
    plain(batch())
    assert model[1].num_batches_tracked == 2
    assert not torch.equal(model[1].running_mean, plain[1].running_mean)


def by_hand(model, batches, epsilon_from):
    """The summed gradient of *batches* at w + epsilon, which is that of the batches *epsilon_from*."""
    reference = copy.deepcopy(model)
    reference.zero_grad()
    for inputs in epsilon_from:
        forward_and_backward(reference, inputs)()
    weights = {name: w.detach().numpy().copy() for name, w in reference.named_parameters()}
    g = {name: w.grad.numpy() for name, w in reference.named_parameters()}
    epsilon = plain_epsilon.epsilon(weights, g, rho=0.5, eta=0.01, p=2.0, normalization="element-wise")
    reference.zero_grad()
    for name, w in reference.named_parameters():
        w.data += torch.tensor(epsilon[name])
    for inputs in batches:
        forward_and_backward(reference, inputs)()
    return gradients(reference)


# Weights that are not those of the construction, or in none of the modules.


def at_w_plus_epsilon(loss, perturbed, others):
    """The gradients of *perturbed*, by name, and *others* at w + epsilon, by hand."""
    weights = [*perturbed.values(), *others]
    g = torch.autograd.grad(loss(), list(perturbed.values()))
    numbers = [
        {name: t.detach().numpy() for name, t in zip(perturbed, each)} for each in (perturbed.values(), g)
    ]
    epsilon = plain_epsilon.epsilon(*numbers, rho=0.5, eta=0.01, p=2.0, normalization="element-wise")
    before = {name: weight.detach().clone() for name, weight in perturbed.items()}
    with torch.no_grad():
        for name, weight in perturbed.items():
            weight.add_(torch.tensor(epsilon[name]))
    result = torch.autograd.grad(loss(), weights)
    with torch.no_grad():
        for name, weight in perturbed.items():
            weight.copy_(before[name])
    return result


def assert_gradients_are_those_at_w_plus_epsilon(
    two_passes, loss, perturbed, others, earlier=False, updates=3
):
    for _ in range(updates):
        for weight in (*perturbed.values(), *others):
            weight.grad = torch.ones_like(weight) if earlier else None
        expected = at_w_plus_epsilon(loss, perturbed, others)

        def evaluate():
            value = loss()
            value.backward()
            return value

        two_passes(evaluate)
        for weight, gradient in zip((*perturbed.values(), *others), expected):
            torch.testing.assert_close(weight.grad - float(earlier), gradient, rtol=1e-11, atol=1e-13)


def first_layer(model):
    return {name: weight for name, weight in model.named_parameters() if name.startswith("0.")}


def test_a_layer_replaced_or_added_after_construction():
    model = plain_network()
    two_passes = TwoPasses(Perturbation(first_layer(model).items(), rho=0.5), [model])
    model[2] = nn.Linear(8, 3).double()
    model.append(nn.Linear(3, 3).double())
    others = [*model[2].parameters(), *model[3].parameters()]
    for earlier in (False, True):
        assert_gradients_are_those_at_w_plus_epsilon(
            two_passes, lambda: model(batch()).square().mean(), first_layer(model), others, earlier
        )


def test_a_parametrization_registered_after_construction():
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    model = plain_network()
    two_passes = two_passes_of(model)
    register_parametrization(model[0], "weight", Half())
    perturbed = dict(model.named_parameters())
    assert_gradients_are_those_at_w_plus_epsilon(
        two_passes, lambda: model(batch()).square().mean(), perturbed, []
    )


class Adapters(nn.Module):
    """A frozen layer with two adapters. Only those of one of them require a gradient at a time."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 3)
        self.adapters = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
        self.double().base.requires_grad_(False)
        self.switch_to(0)

    def switch_to(self, number):
        for each, adapter in enumerate(self.adapters):
            adapter.requires_grad_(each == number)
        self.number = number

    def forward(self, x):
        return self.base(x) + self.adapters[self.number](x).tanh()


def losses_of_adapters():
    torch.manual_seed(0)
    model = Adapters()

    def loss_of(number):
        model.switch_to(number)
        return model(batch()).square().mean()

    return model, loss_of


@pytest.mark.parametrize("known", [True, False])
def test_an_adapter_that_the_function_switches_to_is_perturbed(known):
    model, loss_of = losses_of_adapters()
    two_passes = two_passes_of(model, known=known)
    for number in (0, 1, 0, 1):
        model.zero_grad()
        model.switch_to(number)
        perturbed = dict(model.adapters[number].named_parameters())
        expected = at_w_plus_epsilon(lambda number=number: loss_of(number), perturbed, [])
        model.switch_to(1 - number)

        def evaluate(number):
            loss = loss_of(number)
            loss.backward()
            return loss

        two_passes(evaluate, number)
        for weight, gradient in zip(perturbed.values(), expected):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-11, atol=1e-13)


def test_weights_that_are_frozen_after_they_got_a_gradient_are_refused():
    model, loss_of = losses_of_adapters()
    two_passes = two_passes_of(model)

    def evaluate(number):
        loss = loss_of(number)
        loss.backward()
        return loss

    for number in (0, 1):
        two_passes.at_w(evaluate, number)
    with pytest.raises(RuntimeError, match=r"have been frozen since.*epsilon would leave them out"):
        two_passes.at_w_plus_epsilon()


def test_a_part_of_the_weights_perturbed_without_modules():
    model = plain_network()
    two_passes = TwoPasses(Perturbation(first_layer(model).items(), rho=0.5))
    for earlier in (False, True):
        assert_gradients_are_those_at_w_plus_epsilon(
            two_passes,
            lambda: model(batch()).square().mean(),
            first_layer(model),
            list(model[2].parameters()),
            earlier,
        )


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_weight_and_a_criterion_in_no_module(known, earlier):
    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, outputs):
            return (outputs * self.factor * self.factor).square().mean()

    model, criterion, shift = plain_network(), Criterion(), nn.Parameter(torch.ones(3).double())
    assert_gradients_are_those_at_w_plus_epsilon(
        two_passes_of(model, known=known),
        lambda: criterion(model(batch()) + shift),
        dict(model.named_parameters()),
        [criterion.factor, shift],
        earlier,
    )


class Hiding(nn.Module):
    """Multiplies by weights in a list, which torch does not see, nor do the variables of the function."""

    def __init__(self):
        super().__init__()
        self.network, self.factors = plain_network(), []

    def forward(self, x):
        return math.prod(self.factors, start=self.network(x))


def test_a_weight_that_the_graph_of_the_loss_alone_shows():
    """Also when it joins a loss that was known, when another one takes its place or when there are more."""
    model = Hiding()
    two_passes = two_passes_of(model)
    for factors in ([], [2.0], [3.0], [3.0, 2.0]):
        model.factors = [nn.Parameter(torch.tensor(factor).double()) for factor in factors]
        for earlier in (False, True):
            assert_gradients_are_those_at_w_plus_epsilon(
                two_passes,
                lambda: model(batch()).square().mean(),
                dict(model.named_parameters()),
                model.factors,
                earlier,
            )


def test_a_hidden_weight_whose_gradient_cannot_be_told_apart_is_refused():
    """One that has a gradient from before, or that a pass uses twice."""
    model, hidden = plain_network(), [nn.Parameter(torch.tensor(2.0).double())]
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    for gradient, factor in (
        (torch.ones(()).double(), lambda: hidden[0]),
        (None, lambda: hidden[0] * hidden[0]),
    ):
        hidden[0].grad = gradient

        def evaluate(factor=factor):
            loss = model(batch()).square().mean() * factor()
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match=r"shape \(\) is in neither.*among the parameters"):
            two_passes_of(model)(evaluate)
        hidden[0].grad = None
        TwoPasses(Perturbation(model.named_parameters(), 0.5), [model], hidden)(evaluate)
        assert_same({name: w.detach() for name, w in model.named_parameters()}, before)


def test_inputs_that_get_a_gradient_may_be_made_in_each_turn():
    model = plain_network()
    two_passes = two_passes_of(model)
    for step in range(3):
        inputs = batch(step).requires_grad_()
        assert_gradients_are_those_at_w_plus_epsilon(
            two_passes,
            lambda inputs=inputs: model(inputs).square().mean(),
            dict(model.named_parameters()),
            [inputs],
            updates=1,
        )


def test_inputs_made_within_the_function_are_its_own():
    """Also if they are used twice."""
    model = plain_network()

    def evaluate(inputs):
        own = inputs.clone().requires_grad_()
        loss = (model(own) + model(own + 1)).square().mean()
        loss.backward()
        return loss

    two_passes_of(model)(evaluate, batch())


def test_weights_that_are_replaced_without_a_module_are_told_of():
    weights = {"w": torch.ones(5, 3).double().requires_grad_()}
    two_passes = TwoPasses(Perturbation(weights.items(), rho=0.5))

    def evaluate():
        loss = (batch() @ weights["w"]).square().mean()
        loss.backward()
        return loss

    two_passes(evaluate)
    weights["w"] = weights["w"].detach().clone().requires_grad_()
    with pytest.raises(RuntimeError, match="not those of the perturbation"):
        two_passes(evaluate)


def head_replaced(model):
    model[2] = nn.Linear(8, 3).double()


def weights_assigned(model):
    model.load_state_dict({name: w.clone() for name, w in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("replace", [head_replaced, weights_assigned])
def test_weights_replaced_are_named_before_the_first_pass(replace):
    model = plain_network()
    two_passes = two_passes_of(model)
    replace(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"not those of the perturbation \(.*2.weight, 2.bias are new"):
            two_passes(forward_and_backward(model, batch()))
    assert all(w.grad is None for w in model.parameters())


def test_weights_replaced_are_told_of_without_modules_too():
    model = plain_network()
    two_passes = two_passes_of(model, known=False)
    weights_assigned(model)
    with pytest.raises(RuntimeError, match=r"not those of the perturbation .*anew"):
        two_passes(forward_and_backward(model, batch()))


def test_modules_may_take_turns_if_all_are_perturbed():
    model, heads = plain_network(), [nn.Linear(8, 3).double(), nn.Linear(8, 3).double()]
    named = [(f"{i}.{name}", w) for i, head in enumerate(heads) for name, w in head.named_parameters()]
    two_passes = TwoPasses(Perturbation([*first_layer(model).items(), *named], rho=0.5), [model])
    for step in range(4):
        model[2] = heads[step % 2]
        model.zero_grad()
        two_passes(forward_and_backward(model, batch(step)))
        assert_close(gradients(model), by_hand(model, [batch(step)], [batch(step)]))


def test_a_graph_is_walked_once(monkeypatch):
    """To walk it in each update would take as long as some layers do."""
    walks, leaves = [], two_passes_module._leaves
    monkeypatch.setattr(two_passes_module, "_leaves", lambda root: walks.append(root) or leaves(root))
    model = plain_network()
    two_passes = two_passes_of(model)
    two_passes(forward_and_backward(model, batch(0)))
    first = len(walks)
    for step in range(3):
        two_passes(forward_and_backward(model, batch(step)))
    assert 1 <= first == len(walks)


def test_a_pass_at_w_that_was_left_alone_is_no_part_of_another_update():
    model = plain_network()
    two_passes = two_passes_of(model)
    two_passes.at_w(forward_and_backward(model, batch(1)))
    with pytest.raises(RuntimeError, match=r"has been made whose pass at w \+ epsilon has not"):
        two_passes(forward_and_backward(model, batch(2)))
    two_passes.reset()
    model.zero_grad()
    two_passes(forward_and_backward(model, batch(2)))
    assert_close(gradients(model), by_hand(model, [batch(2)], [batch(2)]))


@pytest.mark.parametrize("goes_on", ["at_w", "at_w_plus_epsilon"])
def test_a_step_after_a_pass_at_w_is_refused(goes_on):
    model = plain_network()
    two_passes, optimizer = two_passes_of(model), torch.optim.SGD(model.parameters(), lr=0.1)
    evaluate = forward_and_backward(model, batch())
    two_passes.at_w(evaluate)
    optimizer.step()
    with pytest.raises(RuntimeError, match="weights have changed since a pass at w"):
        two_passes.at_w(evaluate) if goes_on == "at_w" else two_passes.at_w_plus_epsilon()
    model.zero_grad()
    two_passes(evaluate)
    assert_close(gradients(model), by_hand(model, [batch()], [batch()]))


def in_the_function(model, optimizer):
    return lambda: optimizer.step()


def in_backward(model, optimizer):
    for weight in model.parameters():
        own = torch.optim.SGD([weight], lr=0.1)
        weight.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    return lambda: None


def in_backward_by_hand(model, optimizer):
    def step(weight):
        with torch.no_grad():
            weight.sub_(weight.grad, alpha=0.1)

    model[2].bias.register_post_accumulate_grad_hook(step)
    return lambda: None


@pytest.mark.parametrize("where", [in_the_function, in_backward, in_backward_by_hand])
def test_a_step_within_a_pass_is_refused(where):
    model = plain_network()
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    beside = nn.Parameter(torch.ones(1))  # a weight that no pass knows
    then = where(model, torch.optim.SGD([beside, *model.parameters()], lr=0.1))

    def evaluate():
        loss = model(batch()).square().mean()
        loss.backward()
        then()
        return loss

    with pytest.raises(RuntimeError, match=r"step within a pass|step after both passes"):
        two_passes_of(model)(evaluate)
    if where is not in_backward_by_hand:
        assert_same({name: w.detach() for name, w in model.named_parameters()}, before)


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def assert_close(actual, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-11, atol=1e-14)


def test_one_batch():
    model = plain_network()
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    loss = two_passes_of(model)(forward_and_backward(model, batch()))
    assert loss == model(batch()).square().mean()
    assert_close(gradients(model), by_hand(model, [batch()], [batch()]))
    assert_same({name: w.detach() for name, w in model.named_parameters()}, before)


def test_one_epsilon_over_accumulated_batches():
    model, batches = plain_network(), [batch(1), batch(2), batch(3)]
    two_passes = two_passes_of(model)
    losses = [two_passes.at_w(forward_and_backward(model, inputs)).item() for inputs in batches]
    perturbed = [loss.item() for loss in two_passes.at_w_plus_epsilon()]
    assert_close(gradients(model), by_hand(model, batches, batches))
    assert two_passes.sharpness.item() == pytest.approx(sum(perturbed) - sum(losses), rel=1e-12)


def test_an_epsilon_of_each_batch():
    """m-sharpness: what was accumulated before has no part in a later epsilon."""
    model, batches = plain_network(), [batch(1), batch(2)]
    two_passes = two_passes_of(model)
    for inputs in batches:
        two_passes(forward_and_backward(model, inputs))
    parts = [by_hand(model, [inputs], [inputs]) for inputs in batches]
    assert_close(gradients(model), {name: parts[0][name] + parts[1][name] for name in parts[0]})


def test_epsilon_from_another_batch():
    model = plain_network()
    two_passes = two_passes_of(model)
    part, whole = forward_and_backward(model, batch(1)[:4]), forward_and_backward(model, batch(1))
    two_passes(part, again=whole)
    assert_close(gradients(model), by_hand(model, [batch(1)], [batch(1)[:4]]))


def test_accumulated_batches_draw_the_masks_that_they_drew_at_w():
    model = network("dropout")
    two_passes = two_passes_of(model, rho=0.0)
    seen = []

    def evaluate_on(inputs):
        def evaluate():
            loss = model(inputs).square().mean()
            loss.backward()
            seen.append(loss.item())
            return loss

        return evaluate

    for step in range(3):
        two_passes.at_w(evaluate_on(batch(step)))
        torch.rand(7)  # what data loading may draw in between
    two_passes.at_w_plus_epsilon()
    assert seen[:3] == seen[3:] and len(set(seen)) == 3


def test_the_batch_is_passed_on_to_both_passes():
    model, batches = plain_network(), [batch(1), batch(2), batch(3)]
    two_passes = two_passes_of(model)

    def evaluate(inputs, factor):
        loss = model(inputs).square().mean() * factor
        loss.backward()
        return loss

    for inputs in batches:
        two_passes.at_w(evaluate, inputs, 1.0)
    two_passes.at_w_plus_epsilon()
    assert_close(gradients(model), by_hand(model, batches, batches))
    model.zero_grad()
    two_passes(evaluate, batches[0], 1.0)
    assert_close(gradients(model), by_hand(model, batches[:1], batches[:1]))


def test_fresh_masks_on_request():
    model = network("dropout")
    two_passes = two_passes_of(model, rho=0.0, fresh_masks=True)
    two_passes(forward_and_backward(model, batch()))
    assert two_passes.sharpness != 0.0


class FailsAt:
    def __init__(self, model, inputs, call):
        self.evaluate, self.call = forward_and_backward(model, inputs), call

    def __call__(self):
        self.call -= 1
        loss = self.evaluate()
        if self.call == 0:
            raise MemoryError
        return loss


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("known", [True, False])
def test_after_an_exception_the_model_is_at_w_and_the_next_update_is_as_ever(call, known):
    model = network("batch normalization")
    two_passes = two_passes_of(model, known=known)
    weights = {name: w.detach().clone() for name, w in model.named_parameters()}
    after_one_pass = copy.deepcopy(model)
    after_one_pass(batch())
    forward_and_backward(model, batch(2))()  # an earlier micro-batch
    earlier, state = gradients(model), buffers(model)
    with pytest.raises(MemoryError):
        two_passes(FailsAt(model, batch(), call))
    assert_same({name: w.detach() for name, w in model.named_parameters()}, weights)
    assert np.random.default_rng is DEFAULT_RNG and not _global_forward_pre_hooks
    if call == 1:
        assert_same(gradients(model), earlier)
    else:
        assert model[1].num_batches_tracked == state["1.num_batches_tracked"] + 1
    model.zero_grad()
    fresh = copy.deepcopy(model)
    two_passes(forward_and_backward(model, batch(3)))
    two_passes_of(fresh)(forward_and_backward(fresh, batch(3)))
    assert_same(gradients(model), gradients(fresh))


@pytest.mark.parametrize("returned", [None, "0.5", (), torch.ones(2), True, (None, 1.0)])
def test_what_is_no_loss_is_refused_before_any_weight_moves(returned):
    model = plain_network()
    evaluate, calls = forward_and_backward(model, batch()), []
    with pytest.raises(TypeError, match="but it must return the loss"):
        two_passes_of(model)(lambda: calls.append(evaluate()) or returned)
    assert len(calls) == 1


@pytest.mark.parametrize("of", [float, lambda x: x.view(1), lambda x: (x, "accuracy"), np.float64])
def test_what_counts_as_a_loss(of):
    model = plain_network()
    two_passes, evaluate = two_passes_of(model), forward_and_backward(model, batch())
    two_passes(lambda: of(evaluate().detach()))
    sharpness = float(two_passes.sharpness)
    model.zero_grad()
    two_passes(evaluate)
    assert 0 < sharpness == two_passes.sharpness


def test_a_pass_without_gradients_says_so():
    model = plain_network()
    two_passes = two_passes_of(model)
    with pytest.raises(RuntimeError, match="make no update for a batch that you skip"):
        two_passes(lambda: model(batch()).sum())
    with pytest.raises(RuntimeError, match="no pass at w"):
        two_passes.at_w_plus_epsilon()


def test_the_loss_is_nan_after_a_gradient_at_w_that_is_not_finite():
    """With masks of its own, the second pass might be finite."""
    for factor in (1.0, math.inf):
        model = plain_network()
        two_passes, factors = two_passes_of(model), iter([factor, 1.0])

        def evaluate(model=model, two_passes=two_passes, factors=factors):
            loss = model(batch()).square().mean() * next(factors)
            two_passes.nan_after_overflow(loss).backward()
            return loss

        two_passes(evaluate)
        assert all(torch.isfinite(w.grad).all() == (factor == 1.0) for w in model.parameters())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_with_a_gradient_scaler(micro_batches):
    """Scaled and unscaled loops accumulate, clip and step alike; an update that overflows is skipped."""
    weights = []
    for enabled in (False, True):
        model = plain_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        two_passes = two_passes_of(model)

        def evaluate(inputs, model=model, scaler=scaler, two_passes=two_passes):
            loss = model(inputs).square().mean() / micro_batches
            scaler.scale(two_passes.nan_after_overflow(loss)).backward()
            return loss

        for step in range(4):
            if not enabled and step == 2:
                continue
            for number in range(micro_batches):
                overflows = enabled and step == 2 and number == 0
                inputs = batch(step + number) * (math.inf if overflows else 1.0)
                two_passes.at_w(evaluate, inputs)
            two_passes.at_w_plus_epsilon()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            assert norm > 0.01 or not norm.isfinite()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        weights.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)


def test_a_parametrization_that_is_cached():
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.triu() + weight.triu(1).T

    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    register_parametrization(model[0], "weight", Symmetric())
    two_passes = TwoPasses(Perturbation(first_layer(model).items(), rho=0.5), [model])
    two_passes(forward_and_backward(model, batch()))
    expected, sharpness = gradients(model), two_passes.sharpness
    with cached():
        for _ in range(2):
            model.zero_grad()
            two_passes(forward_and_backward(model, batch()))
            assert_same(gradients(model), expected)
            assert two_passes.sharpness == sharpness > 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_in_the_buckets_of_ddp_are_set_aside_by_value(tmp_path, set_to_none):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = plain_network()
        replica = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        two_passes = TwoPasses(Perturbation(model.named_parameters(), 0.5), [replica])
        for _ in range(3):
            replica.zero_grad(set_to_none)
            for number in (1, 2):
                two_passes(forward_and_backward(replica, batch(number)))
            each = [by_hand(model, [batch(number)], [batch(number)]) for number in (1, 2)]
            assert_close(gradients(model), {name: each[0][name] + each[1][name] for name in each[0]})
    finally:
        dist.destroy_process_group()


def test_gradients_that_are_parts_of_one_vector_stay_so():
    model = plain_network()
    vector = torch.zeros(sum(w.numel() for w in model.parameters()), dtype=torch.float64)
    for weight, part in zip(model.parameters(), vector.split([w.numel() for w in model.parameters()])):
        weight.grad = part.view_as(weight)
    for _ in range(2):
        vector.zero_()
        two_passes_of(model)(forward_and_backward(model, batch()))
        expected = by_hand(model, [batch()], [batch()])
        torch.testing.assert_close(vector, torch.cat([g.flatten() for g in expected.values()]))


@pytest.mark.parametrize("then", ["another pass at w", "the pass at w + epsilon"])
@pytest.mark.parametrize("cleared", ["all", "those of one layer"])
def test_gradients_cleared_between_the_passes_are_refused(then, cleared):
    model = plain_network()
    two_passes = two_passes_of(model)
    two_passes.at_w(forward_and_backward(model, batch(1)))
    (model if cleared == "all" else model[2]).zero_grad()
    with pytest.raises(RuntimeError, match="have been cleared since, and epsilon is made of them"):
        if then == "another pass at w":
            two_passes.at_w(forward_and_backward(model, batch(2)))
        else:
            two_passes.at_w_plus_epsilon()


@pytest.mark.parametrize("features", [8, 4000])
def test_a_buffer_in_the_memory_of_a_weight_is_refused(features):
    layer = nn.Linear(5, features)
    layer.register_buffer("alias", layer.weight.data)
    with pytest.raises(ValueError, match=r"the buffer alias shares memory.*clone\(\)"):
        two_passes_of(layer)


def test_an_empty_buffer_shares_no_memory_with_an_empty_weight():
    model = plain_network()
    model.nothing = nn.Parameter(torch.empty(0).double())
    model.register_buffer("none", torch.empty(0))
    two_passes_of(model)(forward_and_backward(model, batch()))
    assert model[0].weight.grad.any()


def test_one_pass_needs_a_direction_that_needs_no_gradient_at_w():
    model = plain_network()
    two_passes = two_passes_of(model)
    two_passes(forward_and_backward(model, batch(1)))
    with pytest.raises(RuntimeError, match="the gradient at w, which needs a pass at w"):
        two_passes.one_pass(forward_and_backward(model, batch(2)))


def test_one_pass_refuses_weights_that_have_been_replaced():
    model = plain_network()
    two_passes = TwoPasses(Perturbation(model.named_parameters(), 0.5, direction=Random()), [model])
    two_passes.one_pass(forward_and_backward(model, batch()))
    model[-1] = nn.Linear(8, 3).double()
    with pytest.raises(RuntimeError, match="not those of the perturbation"):
        two_passes.one_pass(forward_and_backward(model, batch()))


def test_one_pass_refuses_to_lose_what_it_changed_in_the_weights():
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.1), nn.Linear(4, 2))
    two_passes = TwoPasses(Perturbation(model.named_parameters(), 0.5, direction=Random()), [model])
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(RuntimeError, match=r"changed weights.*the change is lost"):
        two_passes.one_pass(forward_and_backward(model, torch.arange(10)))
    assert all(map(torch.equal, model.parameters(), before))


class Interrupt(TorchDispatchMode):
    """Interrupts one of torch's operations."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if self.left == 0:
            self.left = None
            raise KeyboardInterrupt
        if self.left is not None:
            self.left -= 1
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("features", [8, 4000])
def test_an_interrupt_at_any_operation_leaves_nothing_behind(features):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, features), nn.BatchNorm1d(features), nn.Linear(features, 3)).double()
    two_passes, hooks = two_passes_of(model), len(_global_optimizer_pre_hooks)
    before, number = [(weight.data_ptr(), weight.clone()) for weight in model.parameters()], 0
    while True:
        statistics = [buffers(model)]
        after = copy.deepcopy(model)
        after(batch())
        statistics.append(buffers(after))
        try:
            with Interrupt(number):
                two_passes(forward_and_backward(model, batch()))
            break
        except KeyboardInterrupt:
            number += 1
        for weight, (place, value) in zip(model.parameters(), before):
            assert weight.data_ptr() == place and torch.equal(weight, value)
        assert len(_global_optimizer_pre_hooks) == hooks and not _global_forward_pre_hooks
        found = buffers(model)
        assert any(all(torch.equal(found[name], each[name]) for name in found) for each in statistics)
        model.zero_grad()
    assert number > 50
