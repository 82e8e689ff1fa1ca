"""One update against Algorithm 1 written out in float64, m-sharpness, random numbers, batch normalization and
overflow."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from fairseq_asam import DIRECTIONS, Perturbation
from fairseq_asam.vision.update import Update
from tests.sharpness.plain_directions import ONE_PASS

LR, DECAY, RHO, ETA, SMOOTHING = 0.3, 0.01, 0.4, 0.01, 0.1


def network(*noise):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), *noise, nn.Flatten(), nn.Linear(64, 5)).double()


def batches(count, size=12):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator)
        yield images, torch.randint(5, (size,), generator=generator)


def updater(model, normalization, *, rho=RHO, direction="gradient", scaler=None, **options):
    """The update of *model* by sgd (``normalization=None``), sam or asam with momentum, and the optimizer."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    perturbation = None
    if normalization is not None:
        options_of_epsilon = {"normalization": normalization, "direction": DIRECTIONS[direction](optimizer)}
        perturbation = Perturbation(model.named_parameters(), rho, ETA, **options_of_epsilon)
    prepared = AcceleratedOptimizer(optimizer, scaler=scaler)
    return Update(accelerator, model, prepared, perturbation, label_smoothing=SMOOTHING, **options), optimizer


def gradient(model, weights, images, targets):
    weights = [w.detach().requires_grad_() for w in weights]
    names = [name for name, _ in model.named_parameters()]
    outputs = torch.func.functional_call(model, dict(zip(names, weights)), images)
    loss = F.cross_entropy(outputs, targets, label_smoothing=SMOOTHING)
    return loss.item(), torch.autograd.grad(loss, weights)


def at_w_plus_epsilon(model, weights, normalization, g):
    """The weights where the vectors g lead."""
    names = [name for name, _ in model.named_parameters()]
    t = [
        w.abs() + ETA if normalization == "element-wise" and not name.endswith("bias") else torch.ones_like(w)
        for name, w in zip(names, weights)
    ]
    norm = sum(((t_i * g_i) ** 2).sum() for t_i, g_i in zip(t, g)).sqrt()
    return [w + RHO * t_i**2 * g_i / norm for w, t_i, g_i in zip(weights, t, g)]


def gradient_at_w_plus_epsilon(model, weights, normalization, images, targets):
    loss, g = gradient(model, weights, images, targets)
    moved = at_w_plus_epsilon(model, weights, normalization, g)
    moved_loss, moved_g = gradient(model, moved, images, targets)
    return moved_loss - loss, moved_g


@pytest.mark.parametrize("m", [None, 12, 4])
@pytest.mark.parametrize("normalization", [None, "none", "element-wise"])
def test_algorithm_1(normalization, m):
    """w' = w - lr v, v' = 0.9 v + (the mean over the groups of m of grad L(w + epsilon)) + lambda w."""
    model = network()
    weights = [w.detach().clone() for w in model.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    update, _ = updater(model, normalization, m=m)
    for images, targets in batches(5):
        measured = update(images, targets)
        loss, g = gradient(model, weights, images, targets)
        sharpness = 0.0
        if normalization is not None:
            groups = zip(images.split(m or 12), targets.split(m or 12))
            seen = [gradient_at_w_plus_epsilon(model, weights, normalization, *group) for group in groups]
            sharpness = sum(s for s, _ in seen) / len(seen)
            g = [sum(g_i) / len(seen) for g_i in zip(*(g for _, g in seen))]
        velocity = [0.9 * v + g_i + DECAY * w for v, g_i, w in zip(velocity, g, weights)]
        weights = [w - LR * v for w, v in zip(weights, velocity)]
        assert measured.loss.item() == pytest.approx(loss, rel=1e-12)
        assert measured.sharpness.item() == pytest.approx(sharpness, rel=1e-9, abs=1e-15)
        for w, parameter in zip(weights, model.parameters()):
            torch.testing.assert_close(parameter.detach(), w, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("normalization", ["none", "element-wise"])
@pytest.mark.parametrize("direction", ONE_PASS)
def test_one_pass_where_the_direction_leads(normalization, direction):
    """Momentum's first update is plain."""
    model = network()
    names = [name for name, _ in model.named_parameters()]
    update, _ = updater(model, normalization, direction=direction)
    weights = [w.detach().clone() for w in model.parameters()]
    momenta = [torch.zeros_like(w) for w in weights]
    for number, (images, targets) in enumerate(batches(20)):
        moments, named = (dict(zip(names, each)) for each in (momenta, weights))
        given = {"moments": moments if number else {}, "weights": named, "seed": 0, "number": number}
        g = ONE_PASS[direction](**given)
        moved = at_w_plus_epsilon(model, weights, normalization, g.values()) if g else weights
        loss, g = gradient(model, moved, images, targets)
        momenta = [0.9 * b + g_i + DECAY * w for b, g_i, w in zip(momenta, g, weights)]
        weights = [w - LR * b for w, b in zip(weights, momenta)]
        measured = update(images, targets)
        assert measured.loss.item() == pytest.approx(loss, rel=1e-10) and measured.sharpness.isnan()
        for w, expected in zip(model.parameters(), weights):
            torch.testing.assert_close(w, expected, rtol=1e-10, atol=1e-12)


def test_probabilities_as_targets_count_by_their_largest():
    model = network()
    update, _ = updater(copy.deepcopy(model), "element-wise")
    same, _ = updater(model, "element-wise")
    images, targets = next(batches(1))
    by_number, by_probability = update(images, targets), same(images, F.one_hot(targets, 5).double())
    for a, b in zip(by_number, by_probability):
        assert a.item() == pytest.approx(b.item(), rel=1e-12)


@pytest.mark.parametrize("m", [None, 4])
def test_both_passes_draw_the_same_masks(m):
    """With rho = 0, and nothing but the masks to differ, the two losses are equal."""
    model = network(nn.Dropout(0.5))
    update, _ = updater(model, "element-wise", rho=0.0, m=m)
    torch.manual_seed(2)
    states = []
    for batch in batches(3):
        assert update(*batch).sharpness.item() == 0.0
        states.append(torch.get_rng_state())
    assert not torch.equal(states[0], states[1])


def statistics(model):
    return [buffer for _, buffer in model.named_buffers()]


@pytest.mark.parametrize("m", [None, 4])
def test_batch_norm_statistics_are_those_of_the_passes_at_w(m):
    model = network(nn.BatchNorm2d(4))
    at_w = copy.deepcopy(model)
    images, targets = next(batches(1))
    update, _ = updater(model, "element-wise", m=m)
    update(images, targets)
    for group in images.split(m or 12):
        at_w(group)
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), statistics(at_w)))


def test_batch_norm_statistics_of_both_passes_on_request():
    model = network(nn.BatchNorm2d(4))
    at_w = copy.deepcopy(model)
    images, targets = next(batches(1))
    update, _ = updater(model, "element-wise", statistics_at_w=False)
    update(images, targets)
    at_w(images)
    at_w(images)
    mean, _, count = statistics(model)
    assert count == 2 and not torch.allclose(mean, statistics(at_w)[0])


class OverflowingGradient(nn.Module):
    """The identity, whose gradient overflows in the backward passes of the numbers given, from 0."""

    def __init__(self, when):
        super().__init__()
        self.when, self.passes = when, 0

    def forward(self, x):
        x.register_hook(self._overflow)
        return x

    def _overflow(self, gradient):
        self.passes += 1
        return gradient * torch.inf if self.passes - 1 in self.when else gradient


@pytest.mark.parametrize("m", [None, 4])
@pytest.mark.parametrize("when", [{0}, {1}, {0, 1}])
def test_an_overflow_in_either_pass_skips_the_update_and_lowers_the_scale(when, m):
    model = network(OverflowingGradient(when))
    start = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    update, optimizer = updater(model, "element-wise", scaler=scaler, m=m)
    measured, others = None, list(batches(2))
    measured = update(*others[0])
    assert all(torch.equal(w, start[name]) for name, w in model.state_dict().items())
    assert not any(state["momentum_buffer"] is not None for state in optimizer.state.values() if state)
    assert scaler.get_scale() == 128.0
    assert all(torch.isfinite(value) for value in measured)
    update(*others[1])
    assert not any(torch.equal(w, start[name]) for name, w in model.state_dict().items())


def test_the_scale_of_the_loss_cancels():
    plain, scaled = network(), network()
    update, _ = updater(plain, "element-wise")
    with_scaler, _ = updater(scaled, "element-wise", scaler=torch.amp.GradScaler("cpu"))
    for batch in batches(3):
        update(*batch)
        with_scaler(*batch)
    for a, b in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_without_a_scaler_an_overflow_is_not_hidden():
    model = network(OverflowingGradient({0}))
    update, _ = updater(model, "none")
    first, second = batches(2)
    update(*first)
    assert torch.isnan(update(*second).loss)
