"""Perturbation: the formula, exact restoration, and refusals."""

import contextlib
import gc
import inspect
import itertools
import math
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_asam import NORMALIZATIONS, Perturbation

from . import plain_epsilon

INF = math.inf


def parameters_of(tensors):
    """Leaf parameters with a gradient each, from name -> (weight, gradient) given as nested lists."""
    parameters = {}
    for name, (weight, gradient) in tensors.items():
        parameters[name] = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        parameters[name].grad = torch.tensor(gradient, dtype=torch.float64)
    return parameters


def epsilon_of(parameters, **options):
    before = {name: w.detach().clone() for name, w in parameters.items()}
    with Perturbation(parameters.items(), **options):
        return {name: (w.detach() - before[name]).numpy() for name, w in parameters.items()}


def flat(arrays):
    return np.concatenate([np.asarray(a).ravel() for a in arrays])


# Three weights each, so that the whole region can be enumerated.
ETA = 0.1
SMALL = [
    {"a.weight": ([[0.5, -2.0]], [[1.0, 3.0]]), "a.bias": ([0.7], [-2.0])},
    {"conv.weight": ([[[3.0, -4.0]]], [[[0.2, 0.1]]]), "gain": ([-0.4], [1.5])},
]


def diagonal_of(tensors, normalization):
    return flat(plain_epsilon.diagonal(n, np.array(w), normalization, ETA) for n, (w, _) in tensors.items())


@pytest.mark.parametrize("p", [2.0, 1.5, INF])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("tensors", SMALL, ids=["matrix and bias", "filter and gain"])
def test_epsilon_is_the_maximum_of_the_linearized_loss(tensors, normalization, p):
    rho, diagonal = 0.3, diagonal_of(tensors, normalization)
    gradient = flat(g for _, g in tensors.values())
    epsilon = flat(
        epsilon_of(parameters_of(tensors), rho=rho, eta=ETA, p=p, normalization=normalization).values()
    )

    angles = np.linspace(0, np.pi, 721)
    polar, azimuth = np.meshgrid(angles, 2 * angles)
    sphere = np.stack([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)], -1)
    region = rho * sphere / np.linalg.norm(sphere, ord=p, axis=-1, keepdims=True) * diagonal
    brute_force = (region @ gradient).max()

    assert np.linalg.norm(epsilon / diagonal, ord=p) == pytest.approx(rho, rel=1e-12)
    assert epsilon @ gradient >= brute_force - 1e-12
    assert epsilon @ gradient == pytest.approx(brute_force, rel=2e-3)


def test_closed_forms():
    """p = 2: rho T^2 g / ||T g||; p = inf: rho T sign(g) (Section 4)."""
    for normalization, tensors in itertools.product(NORMALIZATIONS, SMALL):
        t, g = diagonal_of(tensors, normalization), flat(g for _, g in tensors.values())
        for p, expected in ((2.0, t * t * g / np.linalg.norm(t * g)), (INF, t * np.sign(g))):
            epsilon = epsilon_of(parameters_of(tensors), rho=0.3, eta=ETA, p=p, normalization=normalization)
            np.testing.assert_allclose(flat(epsilon.values()), 0.3 * expected, rtol=1e-12)


def test_an_objective_to_maximize_is_descended():
    for p in (2.0, 1.5, INF):
        up, down = (epsilon_of(parameters_of(SMALL[0]), rho=0.3, p=p, maximize=m) for m in (False, True))
        np.testing.assert_allclose(flat(up.values()), -flat(down.values()), rtol=1e-12)


def test_biases_are_normalized_only_if_asked():
    tensors = {"layer.in_proj_bias": ([-3.0], [2.0]), "bias_net.weight": ([5.0], [2.0])}
    tensors["lstm.bias_ih_l0"] = ([-3.0], [2.0])
    for normalize_bias, t in ((False, [1.0, 5.1, 1.0]), (True, [3.1, 5.1, 3.1])):
        epsilon = epsilon_of(parameters_of(tensors), rho=0.1, eta=ETA, p=INF, normalize_bias=normalize_bias)
        np.testing.assert_allclose(flat(epsilon.values()), 0.1 * np.array(t), rtol=1e-12)


def test_a_shared_parameter_is_perturbed_once_and_called_by_its_first_name():
    (weight,) = parameters_of({"w": ([-3.0], [2.0])}).values()
    for names, t in ((("fc.weight", "tied.bias"), 3.1), (("tied.bias", "fc.weight"), 1.0)):
        with Perturbation([(name, weight) for name in names], rho=0.1, eta=ETA, p=INF):
            assert weight.item() == pytest.approx(-3.0 + 0.1 * t, rel=1e-12)


class InterruptAt(TorchDispatchMode):
    """Raises at the n-th tensor operation, once."""

    def __init__(self, n, exception):
        super().__init__()
        self.n, self.exception, self.count = n, exception, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.n:
            raise self.exception
        return function(*args, **(kwargs or {}))


def small_model():
    """Its last weight is large enough to get other memory at w + epsilon."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 400))


def passes(model, perturbation, inputs):
    """The two passes of one step."""
    model.zero_grad()
    model(inputs).pow(2).mean().backward()
    with perturbation:
        model.zero_grad()
        model(inputs).pow(2).mean().backward()


def snapshot(model):
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def assert_unchanged(model, before):
    assert all(torch.equal(w, before[name]) for name, w in model.named_parameters())


def test_weights_come_back_bit_for_bit_in_the_same_storage():
    model, inputs = small_model(), torch.randn(6, 2, 8)
    flat_buffer = torch.cat([w.detach().flatten() for w in model.parameters()])
    offset = 0
    for w in model.parameters():  # as FP16 and DDP flat buffers do
        w.data = flat_buffer[offset : offset + w.numel()].view_as(w)
        offset += w.numel()
    before, flat_before = snapshot(model), flat_buffer.clone()
    pointers = [w.data_ptr() for w in model.parameters()]
    for normalization, p in itertools.product(NORMALIZATIONS, (2.0, 1.5, INF)):
        perturbation = Perturbation(model.named_parameters(), 0.7, p=p, normalization=normalization)
        passes(model, perturbation, inputs)
        assert_unchanged(model, before)
        assert torch.equal(flat_buffer, flat_before)
        assert [w.data_ptr() for w in model.parameters()] == pointers
        with perturbation:
            assert not torch.equal(flat_buffer, flat_before)


def test_a_weight_that_is_part_of_a_buffer_stays_there():
    buffer = torch.ones(20002)
    weight = nn.Parameter(buffer[:20000])
    weight.grad = torch.ones(20000)
    with Perturbation([("weight", weight)], 0.5):
        assert torch.equal(buffer[:20000], weight) and weight[0] > 1
    assert torch.equal(buffer, torch.ones(20002))


def test_epsilon_is_the_same_to_the_bit_wherever_a_weight_lies():
    """Workers that share the optimizer's state (ZeRO) keep their weights in buffers."""
    torch.manual_seed(0)
    values, gradient = torch.randn(500, 400), torch.randn(500, 400)
    moved = []
    for memory in (values.clone(), torch.cat([values, values])[:500]):
        weight = nn.Parameter(memory)
        weight.grad = gradient
        with Perturbation([("weight", weight)], 0.5):
            moved.append(weight.detach().clone())
    assert torch.equal(*moved) and not torch.equal(moved[0], values)


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_share_memory_share_it_at_w_plus_epsilon(frozen):
    """As an output layer does whose weight's data are those of the embedding."""
    embedding, output = nn.Embedding(500, 40), nn.Linear(40, 500, bias=False)
    output.weight.data = embedding.weight.data
    output.weight.requires_grad = not frozen
    model = nn.Sequential(embedding, output)
    before, place = snapshot(model), embedding.weight.data_ptr()
    model(torch.tensor([0, 2])).pow(2).mean().backward()
    with Perturbation(model.named_parameters(), 0.5):
        assert not torch.equal(embedding.weight, before["0.weight"])
        assert torch.equal(embedding.weight, output.weight)
    assert_unchanged(model, before)
    assert embedding.weight.data_ptr() == output.weight.data_ptr() == place


@pytest.mark.parametrize("exception", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_weights_come_back_when_interrupted_anywhere(exception):
    """At every operation of the step: forward, backward, while perturbing and while restoring."""
    model, inputs = small_model(), torch.randn(6, 2, 8)
    with InterruptAt(-1, exception) as counter:
        passes(model, Perturbation(model.named_parameters(), 0.7, normalization="filter-wise"), inputs)
    expected = [w.grad for w in model.parameters()]
    assert counter.count > 50
    before = snapshot(model)
    for n in range(1, counter.count + 1):
        perturbation = Perturbation(model.named_parameters(), 0.7, normalization="filter-wise")
        with pytest.raises(type(exception)), InterruptAt(n, exception):
            passes(model, perturbation, inputs)
        assert_unchanged(model, before)
        passes(model, perturbation, inputs)  # and it can be used again
        assert_unchanged(model, before)
        assert all(map(torch.equal, [w.grad for w in model.parameters()], expected))


def test_weights_come_back_when_interrupted_between_two_lines():
    """As by a KeyboardInterrupt, also when a block's copies are remembered and its weights are not yet."""
    model, tracing = small_model(), sys.gettrace()
    model(torch.randn(6, 2, 8)).square().mean().backward()
    before = snapshot(model)
    functions = Perturbation._move, inspect.unwrap(Perturbation._perturb), Perturbation._remember
    codes = {function.__code__ for function in functions}
    for number in itertools.count(1):
        lines = itertools.count(1)

        def trace(frame, event, argument, lines=lines, number=number):
            if frame.f_code not in codes:
                return None
            if event == "line" and next(lines) == number:
                raise KeyboardInterrupt
            return trace

        perturbation = Perturbation(model.named_parameters(), 0.7, normalization="filter-wise")
        try:
            sys.settrace(trace)
            with perturbation:
                break
        except KeyboardInterrupt:
            assert_unchanged(model, before)
        finally:
            sys.settrace(tracing)
    assert number > 20


def test_gradients_missing_in_either_pass():
    torch.manual_seed(2)
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("always", "first", "second")})
    inputs, before = torch.randn(4, 3), snapshot(model)
    model["always"](model["first"](inputs)).sum().backward()
    with Perturbation(model.named_parameters(), 0.5):
        for w in model["second"].parameters():
            assert torch.equal(w, before[f"second.{'bias' if w.dim() == 1 else 'weight'}"])
        model.zero_grad()
        model["always"](model["second"](inputs)).sum().backward()
    assert_unchanged(model, before)
    assert model["first"].weight.grad is None and model["second"].weight.grad is not None


def test_a_gradient_below_the_range_of_float32_perturbs_nothing():
    """Its norm has no finite reciprocal, or is rounded to 0."""
    for p in (2.0, 1.5, INF):
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        weight.grad = torch.tensor([1e-40, 2e-40])
        with Perturbation([("weight", weight)], 0.5, p=p):
            assert weight.tolist() == [1.0, -2.0]


def test_half_precision_gradients_whose_norm_leaves_half_precision():
    w = nn.Parameter(torch.ones(4, dtype=torch.float16))
    w.grad = torch.full_like(w, 60000.0)
    with pytest.warns(UserWarning, match="master weights"):
        perturbation = Perturbation([("w", w)], rho=2.0, normalization="none")
    with perturbation:
        assert w.tolist() == [2.0] * 4
    assert perturbation.norm == 120000.0


def test_a_gradient_scaler_changes_nothing():
    """Both losses scaled, and unscaled after the block, as the README says."""
    weights = []
    for enabled in (False, True):
        model, inputs = small_model(), torch.linspace(-1, 1, 96).view(6, 2, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        perturbation = Perturbation(model.named_parameters(), 0.7)
        for _ in range(5):
            scaler.scale(model(inputs).pow(2).mean()).backward()
            with perturbation:
                optimizer.zero_grad()
                scaler.scale(model(inputs).pow(2).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        weights.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_and_rho_zero_move_nothing():
    model = small_model()
    model[0].weight.requires_grad_(False)
    before = snapshot(model)
    model(torch.randn(6, 2, 8)).sum().backward()
    with Perturbation(model.named_parameters(), 0.5):
        assert torch.equal(model[0].weight, before["0.weight"])
        assert not torch.equal(model[3].weight, before["3.weight"])
    with Perturbation(model.named_parameters(), 0.0):
        assert_unchanged(model, before)


def relu_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False)).double()


def one_step_sharpness(model, **options):
    inputs = torch.linspace(-1, 1, 40, dtype=torch.float64).view(8, 5)
    targets = torch.arange(8) % 3
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    with Perturbation(model.named_parameters(), **options), torch.no_grad():
        return (nn.functional.cross_entropy(model(inputs), targets) - loss).item()


def test_theorem_1():
    """Rescaling that leaves the network's function alone leaves adaptive sharpness alone, not sharpness."""
    for p in (2.0, INF):
        model = relu_network()
        adaptive = one_step_sharpness(model, rho=0.05, eta=0.0, p=p)
        plain = one_step_sharpness(model, rho=0.05, p=p, normalization="none")
        with torch.no_grad():
            scale = torch.logspace(-1, 1, 16, dtype=torch.float64)  # node by node
            model[0].weight.mul_(3.0 * scale[:, None])
            model[2].weight.div_(3.0 * scale)
        assert one_step_sharpness(model, rho=0.05, eta=0.0, p=p) == pytest.approx(adaptive, rel=1e-6)
        assert one_step_sharpness(model, rho=0.05, p=p, normalization="none") != pytest.approx(plain, rel=0.1)


def test_bad_values_are_refused_in_one_sentence():
    w = nn.Parameter(torch.ones(2))
    for options, message in (
        (dict(rho=-0.1), "rho is -0.1"),
        (dict(rho=math.nan), "rho is nan"),
        (dict(rho=INF), "rho is inf"),
        (dict(rho=0.1, eta=-1), "eta is -1"),
        (dict(rho=0.1, p=1), "p is 1"),
        (dict(rho=0.1, p=math.nan), "p is nan"),
        (dict(rho=0.1, normalization="no-such"), f"'no-such'.*{', '.join(NORMALIZATIONS)}"),
    ):
        with pytest.raises(ValueError, match=message):
            Perturbation([("w", w)], **options)
    with pytest.raises(ValueError, match="v is not a leaf"):
        Perturbation([("v", w * 2)], 0.1)
    with pytest.raises(ValueError, match=r"no parameter to perturb.*v has dtype torch\.int64"):
        Perturbation([("v", torch.ones(2, dtype=torch.int64))], 0.1)
    with pytest.raises(ValueError, match=r"v has dtype torch\.complex64.*two parameters"):
        Perturbation([("w", w), ("v", nn.Parameter(torch.ones(2, dtype=torch.complex64)))], 0.1)
    with pytest.raises(ValueError, match="no parameter to perturb"):
        Perturbation([], 0.1)
    with pytest.raises(TypeError, match=r"model.named_parameters\(\)"):
        Perturbation([w], 0.1)


@pytest.mark.parametrize(
    "name, value", [("rho", math.nan), ("eta", -1.0), ("p", 1.0), ("normalization", "no-such")]
)
def test_values_set_later_are_checked_as_in_the_constructor(name, value):
    perturbation = Perturbation([("w", nn.Parameter(torch.ones(2)))], 0.1)
    before = getattr(perturbation, name)
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        setattr(perturbation, name, value)
    assert getattr(perturbation, name) == before


def test_parameters_that_are_not_real_are_left_alone_while_they_are_frozen():
    model = nn.Linear(2, 2)
    model.table = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64), requires_grad=False)
    perturbation, before = Perturbation(model.named_parameters(), 0.1), snapshot(model)
    for w in (model.weight, model.bias):
        w.grad = torch.ones_like(w)
    with perturbation:
        assert not torch.equal(model.weight, before["weight"])
        assert torch.equal(model.table, before["table"]) and torch.equal(model.phase, before["phase"])
    model.phase.requires_grad_(True).grad = torch.ones_like(model.phase)
    with pytest.raises(ValueError, match=r"phase has dtype torch\.complex64"), perturbation:
        pass
    assert_unchanged(model, before)


def test_weights_are_perturbed_from_when_they_are_unfrozen_until_they_are_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    perturbation, before = Perturbation(model.named_parameters(), 0.1), snapshot(model)
    for frozen in (True, False, True):
        model[0].requires_grad_(not frozen)
        for w in model.parameters():
            w.grad = torch.ones_like(w)  # the frozen have one of before
        with perturbation:
            assert torch.equal(model[0].weight, before["0.weight"]) == frozen
            assert not torch.equal(model[1].weight, before["1.weight"])


class Rebinding(nn.Linear):
    """Puts its weight into new memory in each forward pass, as quantization noise does."""

    def forward(self, x):
        self.weight.data = self.weight.data * 1.0
        return super().forward(x)


def test_a_weight_that_the_forward_pass_puts_into_new_memory_comes_back():
    model = nn.Sequential(Rebinding(4, 3), nn.Linear(3, 2))
    passes(model, Perturbation(model.named_parameters(), 0.5), torch.randn(5, 4))
    model(torch.randn(5, 4)).pow(2).mean().backward()
    before, place = snapshot(model), model[0].weight.data_ptr()
    with Perturbation(model.named_parameters(), 0.5):
        model(torch.randn(5, 4)).pow(2).mean().backward()
        assert model[0].weight.data_ptr() != place
    assert_unchanged(model, before)
    assert model[0].weight.data_ptr() == place


@pytest.mark.parametrize("width", [16, 4096])
def test_a_graph_that_saved_weights_at_another_point_is_refused(width):
    """A large weight is in other memory at w + epsilon."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))
    inputs = torch.randn(5, 8)
    at_w = model(inputs).square().mean()
    at_w.backward(retain_graph=True)
    gradients = [w.grad.clone() for w in model.parameters()]
    with Perturbation(model.named_parameters(), 0.5):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            at_w.backward(retain_graph=True)
        at_w_plus_epsilon = model(inputs).square().mean()
    for loss in (at_w, at_w_plus_epsilon):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    model.zero_grad()
    model(inputs).square().mean().backward()
    assert all(torch.equal(w.grad, gradient) for w, gradient in zip(model.parameters(), gradients))


def test_both_passes_in_one_autocast_see_their_own_weights():
    """Autocast caches half-precision copies of the weights."""
    model, inputs = nn.Linear(8, 4), torch.randn(16, 8)
    perturbation = Perturbation(model.named_parameters(), 2.0)

    def loss():
        return model(inputs).square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        at_w = loss()
        at_w.backward()
        with perturbation:
            perturbed = loss()
        assert loss() == at_w
    with perturbation, torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss() == perturbed
    assert perturbed > 1.1 * at_w


def test_an_optimizer_that_steps_inside_the_block_is_refused():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    for w in (*model.parameters(), *other.parameters()):
        w.grad = torch.ones_like(w)
    before = snapshot(model)
    with Perturbation(model.named_parameters(), 0.1):
        with pytest.raises(RuntimeError, match="and the step would be lost"):
            optimizers[0].step()
        optimizers[1].step()  # other weights
    assert_unchanged(model, before)
    optimizers[0].step()
    assert not torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_holds_a_perturbation_after_its_block(fails):
    """Its hook on all optimizers is gone, and with it the memory of the model."""
    model = nn.Linear(2, 2)
    perturbation = Perturbation(model.named_parameters(), 0.1)
    if not fails:
        model(torch.ones(1, 2)).sum().backward()
    with contextlib.suppress(RuntimeError), perturbation:
        pass
    alive = weakref.ref(perturbation)
    del perturbation
    gc.collect()
    assert alive() is None


def test_bad_use_is_refused_before_any_weight_moves():
    embedding = nn.Embedding(5, 3, sparse=True)
    head = nn.Linear(3, 2)
    model = nn.Sequential(head, embedding)
    before = snapshot(model)
    perturbation = Perturbation(model.named_parameters(), 0.1)
    with pytest.raises(RuntimeError, match="call backward"), perturbation:
        pass
    head(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of 1.weight is sparse"), perturbation:
        pass
    assert_unchanged(model, before)
    embedding.weight.grad = None
    with perturbation:
        with pytest.raises(RuntimeError, match="perturbed already"), perturbation:
            pass
        assert not torch.equal(head.weight, before["0.weight"])
    assert_unchanged(model, before)


def test_an_expanded_weight_is_refused_unless_it_is_frozen():
    weight = torch.nn.Parameter(torch.ones(1).expand(5))
    with pytest.raises(ValueError, match=r"scale has several numbers in one place.*clone\(\)"):
        Perturbation([("scale", weight)], 0.1)
    other = torch.nn.Parameter(torch.ones(3))
    Perturbation([("scale", weight.requires_grad_(False)), ("other", other)], 0.1)


def test_a_weight_of_one_number_may_have_any_stride():
    """As one number that was expanded to a vector of one."""
    weight = nn.Parameter(torch.tensor(2.0).expand(1))
    weight.grad = torch.ones(1)
    with Perturbation([("weight", weight)], 0.5, normalization="none"):
        assert weight.stride() == (0,) and weight.item() == 2.5
    assert weight.item() == 2.0


def test_the_default_device_of_torch_is_not_asked():
    weight = torch.nn.Parameter(torch.ones(10000))
    weight.grad = torch.ones_like(weight)
    with torch.device("meta"), Perturbation([("weight", weight)], 1.0):
        moved = weight.detach().clone()
    torch.testing.assert_close(moved, torch.full_like(moved, 1.01 * 0.01 + 1.0))


def test_t_is_that_of_the_master_and_not_of_the_rounded_weight():
    master = torch.tensor([1.003])
    w = nn.Parameter(master.bfloat16())  # 1.0
    w.grad = torch.ones_like(w)
    with Perturbation([("w", w)], rho=0.5, eta=0.0, masters={w: master}) as perturbation:
        assert perturbation.norm.item() == pytest.approx(1.003, rel=1e-6)
