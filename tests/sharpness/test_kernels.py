"""The arithmetic in blocks against the plain formula, and the memory that is kept between steps."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_asam import NORMALIZATIONS, Perturbation
from fairseq_asam.sharpness.cpu import FastBlock
from fairseq_asam.sharpness.kernels import Ascent, Block

from . import plain_epsilon
from .test_perturbation import ETA, INF, assert_unchanged, epsilon_of, flat, snapshot


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
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_any_shape_and_size_follows_the_formula(normalization, p, normalize_bias, dtype, rtol):
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
def test_twenty_steps_of_the_blocks_are_those_of_the_plain_formula(normalization):
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


def test_more_small_weights_than_go_through_the_arithmetic_together():
    torch.manual_seed(0)
    parameters = {f"{i}.weight": nn.Parameter(torch.randn(150, 150)) for i in range(60)}
    for w in parameters.values():
        w.grad = torch.randn_like(w)
    epsilon = flat(epsilon_of(parameters, rho=500.0, eta=ETA).values())
    t = flat(w.detach().double().abs() + ETA for w in parameters.values())
    g = flat(w.grad.double() for w in parameters.values())
    np.testing.assert_allclose(epsilon, 500.0 * t * t * g / np.linalg.norm(t * g), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1e-12, 1e-7, 1e-5, 0.3, 1e6])
def test_any_eta_follows_the_formula(eta):
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
def test_weights_may_change_place_and_form_between_steps(normalization):
    """What is kept from a step to the next never stands for weights or gradients that are no more."""
    torch.manual_seed(4)
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "linear": nn.Linear(5, 6), "big": nn.Linear(900, 700)})

    def epsilon(perturbation):
        before = snapshot(model)
        with perturbation:
            moved = {name: w.detach() - before[name] for name, w in model.named_parameters()}
        assert_unchanged(model, before)
        return moved

    def new_storage():
        for w in model.parameters():
            w.data = w.detach().clone()

    def gradients_of_another_form():
        model["conv"].weight.grad = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
        model["linear"].weight.grad = torch.randn(5, 6).t()

    def no_gradient():
        model["linear"].bias.grad = model["big"].weight.grad = None

    perturbation = Perturbation(model.named_parameters(), 0.5, normalization=normalization)
    for change in (
        lambda: None,
        new_storage,
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


def test_the_memory_of_the_gradients_is_free_within_the_block():
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


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("normalization", ["none", "element-wise"])
def test_a_fast_block_keeps_its_weights_if_the_norm_is_not_finite(in_place, normalization):
    """Where some weights are on an accelerator, the host does not read the norm."""
    block = FastBlock(NORMALIZATIONS[normalization], ETA, torch.float32)
    block.in_place = in_place
    weight, copy, gradient = torch.ones(3), torch.empty(3), torch.tensor([1.0, np.inf, np.nan])
    block.append(0, weight, weight)
    block.copy = copy
    block.use(torch.empty(3))
    block.norms([gradient], 2.0, None)
    block.move([gradient], Ascent(0.5, 2.0, torch.tensor(0.0), None), lambda *tensors: None)
    assert torch.equal(weight if in_place else copy, torch.ones(3))


@pytest.mark.parametrize("q", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("normalization", ["none", "element-wise"])
def test_a_block_keeps_its_weights_if_the_norm_is_not_finite_and_the_host_does_not_read_it(normalization, q):
    block = Block(NORMALIZATIONS[normalization], ETA, torch.float32)
    weight, gradient = torch.ones(3), torch.tensor([1.0, np.inf, np.nan])
    block.append(0, weight, weight)
    block.use(torch.empty(3))
    block.norms([gradient], q, None)
    block.move([gradient], Ascent(0.5, q, torch.tensor(0.0), torch.tensor(True)), lambda *tensors: None)
    assert torch.equal(weight, torch.ones(3))


class CountLaunches(TorchDispatchMode):
    """Counts the tensor operations that are more than another view of the same memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [2.0, INF])
def test_on_an_accelerator_launches_do_not_grow_with_the_number_of_weights(p):
    counts = []
    for layers in (5, 50):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers))).to("meta")
        for w in model.parameters():
            w.grad = torch.empty_like(w)
        perturbation = Perturbation(model.named_parameters(), 0.1, p=p)
        for _ in range(2):
            with CountLaunches() as launches, perturbation:
                pass
        counts.append(launches.count)
    assert counts[0] == counts[1]
