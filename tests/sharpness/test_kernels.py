"""The arithmetic in blocks against the plain formula, and the memory that is kept between steps.

The form that accelerators compute in is tested on a CPU, too.
"""

import copy
import io
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_asam import NORMALIZATIONS, Perturbation, SharpnessAware
from fairseq_asam.sharpness import blocks, cpu

from . import plain_epsilon
from .test_perturbation import ETA, INF, assert_unchanged, epsilon_of, flat, snapshot


@pytest.fixture(params=["cpu", "accelerator", "accelerator in small blocks"])
def device(request, monkeypatch):
    """The kind of device whose form is computed in, by this CPU."""
    if request.param != "cpu":
        monkeypatch.setattr(cpu, "is_on_cpu", lambda tensor: False)
    if request.param == "accelerator in small blocks":
        monkeypatch.setattr(blocks, "_BLOCK_SIZE", 2**16)
    return request.param


def many_shapes():
    """Small weights, one larger than any block, some that are not contiguous, an empty one and a scalar."""
    torch.manual_seed(0)
    tensors = {f"layers.{i}.bias": torch.randn(5) for i in range(40)}
    tensors["embedding.weight"] = torch.randn(1700, 331)
    tensors["transposed.weight"] = torch.randn(70, 1300).t()
    tensors["conv.weight"] = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    tensors["lstm.weight_hh_l0"], tensors["lstm.bias_hh_l0"] = torch.randn(30, 10), torch.randn(30)
    tensors["empty.weight"] = torch.empty(0, 3)
    tensors["scalar"] = torch.tensor(1.5)
    return tensors


@pytest.mark.parametrize("p", [2.0, 1.01, 1.5, 7.0, INF])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("normalize_bias", [False, True])
@pytest.mark.parametrize(
    "device, dtype, rtol",
    [
        ("cpu", torch.float64, 1e-9),
        ("cpu", torch.float32, 2e-3),
        ("accelerator", torch.float64, 1e-9),
        ("accelerator in small blocks", torch.float32, 2e-3),
    ],
    indirect=["device"],
)
def test_any_shape_and_size_follows_the_formula(normalization, p, normalize_bias, device, dtype, rtol):
    parameters = {name: nn.Parameter(t.to(dtype)) for name, t in many_shapes().items()}
    for w in parameters.values():
        w.grad = torch.randn_like(w) * 1e-3
    # Large, so that w + epsilon - w keeps enough digits.
    options = dict(rho=20.0, eta=ETA, p=p, normalization=normalization, normalize_bias=normalize_bias)
    epsilon = epsilon_of(parameters, **options)
    weights = {name: w.detach().double().numpy() for name, w in parameters.items()}
    gradients = {name: w.grad.double().numpy() for name, w in parameters.items()}
    expected = flat(plain_epsilon.epsilon(weights, gradients, **options).values())
    largest = np.abs(expected).max()
    np.testing.assert_allclose(flat(epsilon.values()), expected, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_twenty_steps_of_the_blocks_are_those_of_the_plain_formula(normalization, device):
    """SGD from the same start, side by side, with what is kept between steps."""
    parameters = {name: nn.Parameter(t.double()) for name, t in many_shapes().items()}
    weights = {name: w.detach().numpy().copy() for name, w in parameters.items()}
    options = dict(rho=0.5, eta=0.01, p=2.0, normalization=normalization)
    perturbation = Perturbation(parameters.items(), **options)
    for _ in range(20):  # of the loss -sum cos w
        for w in parameters.values():
            w.grad = w.detach().sin()
        with perturbation:
            gradients = {name: w.detach().sin() for name, w in parameters.items()}
        epsilon = plain_epsilon.epsilon(weights, {n: np.sin(w) for n, w in weights.items()}, **options)
        for name, w in parameters.items():
            w.data -= 0.1 * gradients[name]
            weights[name] = weights[name] - 0.1 * np.sin(weights[name] + epsilon[name])
    for name, w in parameters.items():
        np.testing.assert_allclose(w.detach().numpy(), weights[name], rtol=1e-12, atol=1e-14)


def test_more_small_weights_than_go_through_the_arithmetic_together(device):
    torch.manual_seed(0)
    parameters = {f"{i}.weight": nn.Parameter(torch.randn(150, 150)) for i in range(60)}
    for w in parameters.values():
        w.grad = torch.randn_like(w)
    epsilon = flat(epsilon_of(parameters, rho=500.0, eta=ETA).values())
    t = flat(w.detach().double().abs() + ETA for w in parameters.values())
    g = flat(w.grad.double() for w in parameters.values())
    np.testing.assert_allclose(epsilon, 500.0 * t * t * g / np.linalg.norm(t * g), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1e-12, 1e-7, 1e-5, 0.3, 1e6])
def test_any_eta_follows_the_formula(eta, device):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(300))
    weight.grad = torch.randn(300) * 1e3
    w, g = weight.detach().double(), weight.grad.double()
    t = w.abs() + eta
    expected = 2.0 * t**2 * g / (t * g).norm()
    perturbation = Perturbation([("weight", weight)], rho=2.0, eta=eta)
    with perturbation:
        epsilon = weight.detach().double() - w
    torch.testing.assert_close(epsilon, expected, rtol=1e-4, atol=1e-6 * max(1.0, eta))
    assert perturbation.norm.item() == pytest.approx((t * g).norm().item(), rel=1e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_weights_may_change_place_and_form_between_steps(normalization, device):
    """What is kept from a step to the next never stands for weights or gradients that are no more."""
    torch.manual_seed(4)
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "linear": nn.Linear(5, 6), "big": nn.Linear(900, 700)})
    model["square"] = nn.Linear(9, 9)

    def epsilon(perturbation):
        before = snapshot(model)
        with perturbation:
            moved = {name: w.detach() - before[name] for name, w in model.named_parameters()}
        assert_unchanged(model, before)
        return moved

    def new_storage():
        for w in model.parameters():
            w.data = w.detach().clone()

    def transposed_in_its_place():
        model["square"].weight.data = model["square"].weight.data.t()

    def gradients_of_another_form():
        model["conv"].weight.grad = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
        model["linear"].weight.grad = torch.randn(5, 6).t()

    def no_gradient():
        model["linear"].bias.grad = model["big"].weight.grad = None

    perturbation = Perturbation(model.named_parameters(), 0.5, normalization=normalization)
    for change in (
        lambda: None,
        new_storage,
        transposed_in_its_place,
        gradients_of_another_form,
        no_gradient,
        lambda: None,
        lambda: setattr(perturbation, "eta", 0.3),
        lambda: setattr(perturbation, "p", INF),
        lambda: setattr(perturbation, "p", 2.0),
        model.double,
        lambda: model.to(memory_format=torch.channels_last),
    ):
        for w in model.parameters():
            w.grad = torch.randn_like(w)
        change()
        options = dict(eta=perturbation.eta, p=perturbation.p, normalization=normalization)
        fresh = Perturbation(model.named_parameters(), 0.5, **options)
        kept, expected = epsilon(perturbation), epsilon(fresh)
        assert any(e.any() for e in expected.values())
        for name, e in expected.items():
            torch.testing.assert_close(kept[name], e, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moments_may_have_another_dtype_than_weights(dtype, device):
    """As those of optimizers that save memory."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5000))
    base = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer = SharpnessAware(base, model, rho=0.5, direction="momentum")
    moments = {w: torch.randn_like(w).bfloat16() for w in model.parameters()}
    moved = []
    for moment_dtype in (dtype, torch.float32):
        for w, moment in moments.items():
            base.state[w]["momentum_buffer"] = moment.to(moment_dtype)
        before = [w.detach().clone() for w in model.parameters()]
        with optimizer.perturbation:
            moved.append(torch.cat([(w - b).flatten() for w, b in zip(model.parameters(), before)]).detach())
    assert moved[0].any() and torch.equal(*moved)


def test_the_memory_of_the_gradients_is_free_within_the_block(device):
    array = np.ones((300, 20), dtype=np.float32)
    w = nn.Parameter(torch.randn(300, 20))
    w.grad, alive = torch.from_numpy(array), weakref.ref(array)
    del array
    for perturbation in (Perturbation([("w", w)], 0.1), Perturbation([("w", w)], 0.1, p=INF)):
        with perturbation:
            assert alive() is not None
    with perturbation:
        w.grad = None
        assert alive() is None


def test_an_accelerator_keeps_one_copy_of_the_weights_within_the_block(monkeypatch):
    monkeypatch.setattr(cpu, "is_on_cpu", lambda tensor: False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 300))
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    perturbation = Perturbation(model.named_parameters(), 0.1)
    with perturbation:
        kept = perturbation._blocks
        assert sum(block.copy.untyped_storage().nbytes() for block in kept._blocks) == 4 * sum(
            w.numel() for w in model.parameters()
        )
        assert [memory.untyped_storage().nbytes() for memory in kept._memory.values()] == [0]


def test_a_perturbation_that_was_used_can_be_copied_and_pickled(device):
    model = nn.ModuleDict({"small": nn.Linear(3, 2), "large": nn.Linear(100, 200)})
    perturbation = Perturbation(model.named_parameters(), 0.5)
    model.perturbation = perturbation

    def moved(model):
        for w in model.parameters():
            w.grad = w.detach().sin()
        with model.perturbation:
            return [w.detach().clone() for w in model.parameters()]

    expected = moved(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert all(map(torch.equal, moved(copied), expected))
        assert copied["large"].weight is not model["large"].weight


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("p", [2.0, 1.5, 3.0, INF])
@pytest.mark.parametrize("bad", [0.0, np.inf, -np.inf, np.nan])
def test_a_norm_that_is_zero_or_not_finite_moves_nothing(normalization, p, bad, device):
    parameters = {name: nn.Parameter(torch.ones(2, 3, 3)) for name in ("a.weight", "a.bias")}
    for w in parameters.values():
        w.grad = torch.full_like(w, bad)
    parameters["a.weight"].grad[0, 0, 0] = bad and 1.0
    parameters["a.bias"].grad.fill_(bad and 1.0)
    perturbation = Perturbation(parameters.items(), 0.5, p=p, normalization=normalization)
    with perturbation:
        assert all(torch.equal(w, torch.ones(2, 3, 3)) for w in parameters.values())
    assert perturbation.norm == 0.0 if bad == 0.0 else not perturbation.norm.isfinite()


@pytest.mark.parametrize("p", [2.0, INF])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_epsilon_is_added_to_the_masters_and_rounded_once(normalization, p, dtype, device):
    """It is far below the resolution of half precision."""
    torch.manual_seed(0)
    masters = {"conv.weight": torch.randn(20, 30, 3, 3), "conv.bias": torch.randn(20), "x": torch.randn(500)}
    parameters = {name: nn.Parameter(master.to(dtype)) for name, master in masters.items()}
    for w in parameters.values():
        w.grad = torch.randn_like(w)
    options = dict(rho=0.01 if p == 2.0 else 1e-4, eta=ETA, p=p, normalization=normalization)
    perturbation = Perturbation(
        parameters.items(), **options, masters={parameters[name]: masters[name] for name in masters}
    )
    with perturbation:
        moved = {name: w.detach().clone() for name, w in parameters.items()}
    gradients = {name: w.grad.double().numpy() for name, w in parameters.items()}
    exact = {name: master.double().numpy() for name, master in masters.items()}
    epsilon = plain_epsilon.epsilon(exact, gradients, **options)
    for name, w in parameters.items():
        rounded = torch.from_numpy(exact[name] + epsilon[name]).to(dtype)
        assert (moved[name] == rounded).float().mean() > 0.999
        assert torch.equal(w, masters[name].to(dtype))


@pytest.mark.parametrize("normalization", ["element-wise", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_masters_is_rounded_once(normalization, dtype, device):
    torch.manual_seed(0)
    parameters = {f"{size}.weight": nn.Parameter(torch.randn(size).to(dtype)) for size in (300, 20000)}
    for w in parameters.values():
        w.grad = torch.randn_like(w)
    options = dict(rho=20.0, eta=ETA, p=2.0, normalization=normalization)
    with pytest.warns(UserWarning, match="half-precision weights absorb most of epsilon"):
        perturbation = Perturbation(parameters.items(), **options)
    exact = {name: w.detach().double().numpy() for name, w in parameters.items()}
    gradients = {name: w.grad.double().numpy() for name, w in parameters.items()}
    epsilon = plain_epsilon.epsilon(exact, gradients, **options)
    with perturbation:
        for name, w in parameters.items():
            rounded = torch.from_numpy(exact[name] + epsilon[name]).to(dtype)
            assert (w == rounded).float().mean() > 0.99


def overlapping(kind, size):
    """Two weights and a bias. The first weight shares memory with both others."""
    buffer = torch.randn(2 * size, dtype=torch.float64)
    first = buffer[:size].view(2, -1)
    second = {
        "the same": first,
        "a part": buffer[size // 2 : 3 * size // 2].view(-1, 2),
        "columns": buffer.view(2, -1)[:, : size // 2],
        "transposed": first.t(),
        "of another storage": torch.from_numpy(buffer.numpy()[1 : size + 1]),
        "the last number": torch.from_numpy(buffer.numpy()[size - 1 : 2 * size - 1]),
    }[kind]
    return buffer, {"a.weight": first, "b.weight": second, "b.bias": buffer[3 : 3 + size // 2]}


@pytest.mark.parametrize("size", [16, 40000])
@pytest.mark.parametrize(
    "kind", ["the same", "a part", "columns", "transposed", "of another storage", "the last number"]
)
@pytest.mark.parametrize(
    "p, normalization", [(2.0, "element-wise"), (2.0, "layer-wise"), (INF, "element-wise")]
)
def test_memory_of_several_weights_gets_the_sum_of_their_epsilons(kind, size, p, normalization, device):
    torch.manual_seed(0)
    buffer, tensors = overlapping(kind, size)
    before = buffer.clone()
    parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    assert all(w.data_ptr() == tensors[name].data_ptr() for name, w in parameters.items())
    for w in parameters.values():
        w.grad = torch.randn(w.shape, dtype=torch.float64)
    options = dict(rho=0.5, eta=ETA, p=p, normalization=normalization)
    perturbation = Perturbation(parameters.items(), **options)
    for _ in range(2):
        with perturbation:
            moved = buffer.clone()
        assert torch.equal(buffer, before)
    epsilon = plain_epsilon.epsilon(
        {name: w.detach().numpy() for name, w in parameters.items()},
        {name: w.grad.numpy() for name, w in parameters.items()},
        **options,
    )
    for name, w in parameters.items():
        with torch.no_grad():
            w += torch.from_numpy(epsilon[name])
    torch.testing.assert_close(moved, buffer, rtol=1e-9, atol=1e-11)


def test_memory_of_several_weights_with_masters_gets_the_sum_of_their_epsilons(device):
    torch.manual_seed(0)
    master = torch.randn(300)
    parameters = {name: nn.Parameter(master.half()) for name in ("a.weight", "b.weight")}
    parameters["b.weight"].data = parameters["a.weight"].data
    for w in parameters.values():
        w.grad = torch.randn_like(w)
    masters = {w: master.clone() for w in parameters.values()}
    perturbation = Perturbation(parameters.items(), 0.5, masters=masters)
    with perturbation:
        moved = parameters["a.weight"].detach().double()
    assert torch.equal(parameters["a.weight"], master.half())
    t, g = master.double().abs() + 0.01, [w.grad.double() for w in parameters.values()]
    expected = master + 0.5 * t**2 * sum(g) / torch.stack([t * each for each in g]).norm()
    torch.testing.assert_close(moved, expected, rtol=2**-10, atol=2**-12)


class CountOperations(TorchDispatchMode):
    """Counts all tensor operations, views too."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [2.0, INF])
def test_on_an_accelerator_operations_do_not_grow_with_the_number_of_weights(p):
    counts = []
    for layers in (5, 50):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))).to("meta")
        for w in model.parameters():
            w.grad = torch.empty_like(w)
        perturbation = Perturbation(model.named_parameters(), 0.1, p=p)
        for _ in range(2):
            with CountOperations() as operations, perturbation:
                pass
        counts.append(operations.count)
    assert counts[0] == counts[1] < 40
