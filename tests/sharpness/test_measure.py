"""measure: the maximum that Equations 2 and 4 mean, Theorem 1, and what is left as it was."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrize import cached, register_parametrization

from fairseq_asam import NORMALIZATIONS, Region, SharpnessAware, measure
from fairseq_asam.sharpness.measure import _Ball

from . import plain_epsilon

INF = math.inf
ETA = 0.1


class Quadratic:
    """L(w) = g (w - w0) + (w - w0) H (w - w0) / 2 at w0, over a convolution, a matrix and a bias."""

    def __init__(self, eigenvalues, seed):
        random = np.random.default_rng(seed)
        shapes = {"conv.weight": (2, 1, 2), "layer.weight": (1, 2), "layer.bias": (1,)}
        self.parameters = {
            name: nn.Parameter(torch.tensor(random.normal(size=s))) for name, s in shapes.items()
        }
        self.w0 = self.flat()
        basis = np.linalg.qr(random.normal(size=(7, 7)))[0]
        self.hessian = basis @ np.diag(eigenvalues) @ basis.T
        self.gradient = random.normal(size=7)

    def flat(self):
        return np.concatenate([w.detach().numpy().ravel() for w in self.parameters.values()])

    def loss(self):
        moved = torch.cat([w.flatten() for w in self.parameters.values()]) - torch.tensor(self.w0)
        return torch.tensor(self.gradient) @ moved + moved @ torch.tensor(self.hessian) @ moved / 2

    def at(self, epsilon):
        return epsilon @ self.gradient + np.einsum("...i,ij,...j", epsilon, self.hessian, epsilon) / 2

    def diagonal(self, normalization):
        weights = {name: w.detach().numpy() for name, w in self.parameters.items()}
        return np.concatenate(
            [plain_epsilon.diagonal(n, w, normalization, ETA).ravel() for n, w in weights.items()]
        )


def maximum_over_ball(hessian, gradient, rho):
    """max g e + e H e / 2 over ||e||_2 <= rho, where the largest eigenvalue is positive and g is not
    orthogonal to its eigenvector: at e = (mu I - H)^-1 g with ||e|| = rho and mu above all eigenvalues."""
    eigenvalues, vectors = np.linalg.eigh(hessian)
    rotated = vectors.T @ gradient
    low, high = eigenvalues[-1], eigenvalues[-1] + np.linalg.norm(gradient) / rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if np.linalg.norm(rotated / (mu - eigenvalues)) > rho else (low, mu)
    e = rotated / (high - eigenvalues)
    return e @ rotated + eigenvalues @ e**2 / 2


CONVEX = [0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0]
INDEFINITE = [-4.0, -2.0, -1.0, 0.5, 1.0, 2.0, 4.0]


def flat_epsilon(sharpness, quadratic):
    return np.concatenate([sharpness.epsilon[name].numpy().ravel() for name in quadratic.parameters])


@pytest.mark.parametrize("eigenvalues", [CONVEX, INDEFINITE], ids=["convex", "indefinite"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_projected_ascent_finds_the_maximum_of_a_quadratic_over_the_ball(normalization, eigenvalues):
    for seed, rho in itertools.product(range(3), (0.05, 0.7)):
        quadratic = Quadratic(eigenvalues, seed)
        t = quadratic.diagonal(normalization)
        expected = maximum_over_ball(t[:, None] * quadratic.hessian * t, t * quadratic.gradient, rho)
        region = Region(rho, ETA, normalization=normalization)
        [found] = measure(
            quadratic.loss, quadratic.parameters.items(), [region], steps=150, restarts=3, keep_epsilon=True
        )
        assert found.value == pytest.approx(expected, rel=1e-9)
        epsilon = flat_epsilon(found, quadratic)
        assert np.linalg.norm(epsilon / t) == pytest.approx(rho, rel=1e-9)
        assert quadratic.at(epsilon) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_over_the_cube_the_maximum_of_a_convex_loss_is_at_a_vertex(normalization):
    for seed, rho in itertools.product(range(3), (0.05, 0.7)):
        quadratic = Quadratic(CONVEX, seed)
        t = quadratic.diagonal(normalization)
        vertices = rho * t * np.array(list(itertools.product([-1, 1], repeat=7)))
        region = Region(rho, ETA, p=INF, normalization=normalization)
        [found] = measure(
            quadratic.loss, quadratic.parameters.items(), [region], steps=10, restarts=20, keep_epsilon=True
        )
        assert found.value == pytest.approx(quadratic.at(vertices).max(), rel=1e-9)
        np.testing.assert_allclose(np.abs(flat_epsilon(found, quadratic)), rho * t, rtol=1e-9)


@pytest.mark.parametrize("p", [2.0, 1.5, INF])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_one_step_is_the_step_of_training(normalization, p):
    quadratic = Quadratic(INDEFINITE, 0)
    t, q = quadratic.diagonal(normalization), 1.0 if p == INF else p / (p - 1.0)
    normalized = t * quadratic.gradient
    e = np.sign(normalized) * np.abs(normalized) ** (q - 1) / np.linalg.norm(normalized, q) ** (q - 1)
    region = Region(0.3, ETA, p, normalization)
    [found] = measure(quadratic.loss, quadratic.parameters.items(), [region], keep_epsilon=True)
    np.testing.assert_allclose(flat_epsilon(found, quadratic), 0.3 * t * e, rtol=1e-12)
    assert found.value == pytest.approx(quadratic.at(0.3 * t * e), rel=1e-12)
    assert found.loss == 0.0

    optimizer = SharpnessAware(
        torch.optim.SGD(quadratic.parameters.values(), lr=0.1),
        quadratic.parameters.items(),
        0.3,
        eta=ETA,
        p=p,
        normalization=normalization,
    )

    def closure():
        optimizer.zero_grad()
        loss = quadratic.loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert found.value == pytest.approx(optimizer.sharpness.item(), rel=1e-12)


@pytest.mark.parametrize("p", [2.0, INF])
def test_more_steps_and_restarts_never_find_less(p):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(20, dtype=torch.float64))

    def waves():
        return (3 * w).sin().sum() + (7 * w).cos().sum()

    def found(**options):
        return measure(waves, [("w", w)], [Region(0.8, p=p, normalization="none")], **options)[0].value

    one, five, fifty, with_restarts = found(), found(steps=5), found(steps=50), found(steps=50, restarts=20)
    assert one < five <= fifty < with_restarts
    assert with_restarts == found(steps=50, restarts=20)
    assert found(steps=2, restarts=2, seed=1) == found(steps=2, restarts=2, seed=1)
    assert found(steps=2, restarts=9, seed=1) != found(steps=2, restarts=9, seed=2)


def test_at_a_maximum_the_sharpness_is_zero():
    region = Region(0.5, normalization="none")
    for almost_zero in (0.0, 1e-9):
        w = nn.Parameter(torch.full((3,), almost_zero, dtype=torch.float64))
        [found] = measure(lambda w=w: -w @ w, [("w", w)], [region], steps=5, restarts=4, keep_epsilon=True)
        assert found.value == 0.0
        assert torch.equal(found.epsilon["w"], torch.zeros_like(w))


# Theorem 1. The networks are trained, so that their weights are not of one size.


def trained(model, inputs, targets):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


class SelfAttention(nn.Module):
    """A Transformer layer, and a classifier of the mean of its outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.output = nn.Linear(8, 3)

    def forward(self, x):
        return self.output(self.layer(x).mean(1))


def rescale(weights, factor):
    with torch.no_grad():
        for weight in weights:
            weight.mul_(factor)


def rescaled_perceptron(model, factor):
    rescale(model[0].parameters(), factor)
    rescale([model[2].weight], 1 / factor)


def rescaled_transformer(model, factor):
    attention = model.layer.self_attn
    for projection in (attention.in_proj_weight, attention.in_proj_bias):
        query, key, value = projection.chunk(3)
        rescale([query, value], factor)
        rescale([key], 1 / factor)
    rescale([attention.out_proj.weight], 1 / factor)
    rescale([model.layer.linear1.weight, model.layer.linear1.bias], factor)
    rescale([model.layer.linear2.weight], 1 / factor)


NETWORKS = {
    "ReLU": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
        (6,),
        rescaled_perceptron,
        "element-wise",
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3), nn.Flatten(), nn.Linear(6, 3)
        ),
        (2, 6),
        rescaled_perceptron,
        "filter-wise",
    ),
    "Transformer": (SelfAttention, (5, 8), rescaled_transformer, "element-wise"),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    """A trained model, the same model rescaled, the normalization that makes up for that, and a function
    that gives a model's loss."""
    build, shape, rescaled, normalization = NETWORKS[request.param]
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, *shape, dtype=torch.float64), torch.randint(3, (40,))
    model = trained(build().double(), inputs, targets)
    other = copy.deepcopy(model)
    rescaled(other, 4.0)
    return model, other, normalization, lambda model: lambda: cross_entropy(model(inputs), targets)


def sharpnesses(network, *regions, **options):
    model, other, _, loss_of = network
    return [[s.value for s in measure(loss_of(m), m, regions, **options)] for m in (model, other)]


@pytest.mark.parametrize("options", [{}, {"steps": 6, "restarts": 2}], ids=["one step", "projected"])
def test_adaptive_sharpness_is_invariant_to_rescaling_and_sharpness_is_not(network, options):
    adaptive = [Region(0.3 if p == 2 else 0.05, 0.0, p, network[2], normalize_bias=True) for p in (2.0, INF)]
    before, after = sharpnesses(network, *adaptive, **options)
    assert min(before) > 1e-3
    assert after == pytest.approx(before, rel=1e-10)

    plain = [Region(r.rho, p=r.p, normalization="none") for r in adaptive]
    before, after = sharpnesses(network, *plain, **options)
    assert all(abs(a - b) > 0.02 * b for a, b in zip(after, before))


def test_eta_and_biases_without_normalization_bound_the_invariance(network):
    """With eta > 0 a weight much smaller than eta moves like a constant, which no longer scales with it."""
    changes = []
    for eta in (0.0, 1e-4, 1e-2):
        before, after = sharpnesses(network, Region(0.3, eta, 2.0, network[2], normalize_bias=True))
        changes.append(abs(after[0] / before[0] - 1))
    assert changes[0] < 1e-10 < changes[1] < changes[2]
    before, after = sharpnesses(network, Region(0.3, 0.0, 2.0, network[2]))
    assert abs(after[0] / before[0] - 1) > 1e-4


# What is left as it was, and what may go wrong.


class Small(nn.Module):
    """Has dropout, a batch normalization whose mode differs from the rest, a frozen and an unused weight."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.layers[1].eval()
        self.layers[3].bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.layers(x)


def small():
    torch.manual_seed(0)
    model, x, y = Small(), torch.randn(10, 4), torch.randint(2, (10,))

    def loss(*sizes):
        for inputs, targets in zip(x.split(sizes), y.split(sizes)):
            yield cross_entropy(model(inputs), targets, reduction="sum"), len(targets)

    return model, loss


REGIONS = [Region(0.2), Region(0.1, p=INF, normalization="none")]


@pytest.mark.parametrize("options", [{}, {"steps": 3, "restarts": 2}], ids=["one step", "projected"])
def test_the_mean_is_over_examples_however_they_are_batched(options):
    model, loss = small()
    whole = measure(lambda: loss(10), model, REGIONS, **options)
    parts = measure(lambda: loss(3, 3, 3, 1), model, REGIONS, **options)
    assert [s.value for s in parts] == pytest.approx([s.value for s in whole], rel=1e-4)
    assert [s.loss for s in parts] == pytest.approx([s.loss for s in whole], rel=1e-6)


def everything(model):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return copy.deepcopy(model.state_dict()), gradients, [module.training for module in model.modules()]


def assert_the_same(before, after):
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert all(gradient is after[1][name] for name, gradient in before[1].items())
    assert before[2] == after[2]


@pytest.mark.parametrize("options", [{}, {"steps": 3, "restarts": 2}], ids=["one step", "projected"])
def test_weights_gradients_and_modes_come_back_also_after_an_exception(options):
    model, loss = small()
    model.layers[0].weight.grad = torch.ones(8, 4)
    before = everything(model)
    calls = []

    def counted():
        calls.append([module.training for module in model.modules()])
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return loss(5, 5)

    fails_at = 0
    first = measure(counted, model, REGIONS, keep_epsilon=True, **options)
    assert not any(itertools.chain(*calls))
    assert_the_same(before, everything(model))
    assert first[0].epsilon.keys() == {
        *("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "layers.3.weight")
    }
    total, again = len(calls), measure(counted, model, REGIONS, **options)
    assert [s.value for s in first] == [s.value for s in again]
    for call in range(1, total + 1):
        calls, fails_at = [], call
        with pytest.raises(KeyboardInterrupt):
            measure(counted, model, REGIONS, **options)
        assert_the_same(before, everything(model))


def test_pairs_leave_the_mode_alone():
    model, loss = small()
    modes = []

    def seen():
        modes.append(model.training)
        return loss(10)

    measure(seen, model.named_parameters(), REGIONS)
    assert modes == [True, True, True]


def test_a_parametrization_that_is_cached_is_computed_at_each_point():
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.triu() + weight.triu(1).T

    torch.manual_seed(0)
    model = nn.Linear(4, 4).double()
    register_parametrization(model, "weight", Symmetric())
    x = torch.randn(8, 4).double()
    regions = [Region(0.5), Region(0.1, normalization="none")]
    expected = measure(lambda: model(x).square().mean(), model, regions)
    with cached():
        assert measure(lambda: model(x).square().mean(), model, regions) == expected
    assert expected[0].value > 0


def test_a_loss_that_is_not_finite_is_counted_and_never_the_maximum():
    w = nn.Parameter(torch.tensor([0.5, 0.5], dtype=torch.float64))

    def log_barrier():  # NaN where w_1 >= 1
        return w[1] - torch.log(1 - w[0])

    region = Region(1.0, normalization="none")
    with pytest.warns(UserWarning, match="1 of 1 points seen in Region.*not finite"):
        [found] = measure(log_barrier, [("w", w)], [region])
    assert found.value == INF and found.non_finite == 1
    for seed in range(10):
        with pytest.warns(UserWarning, match="not finite; the sharpness is that of the others"):
            [found] = measure(log_barrier, [("w", w)], [region], steps=5, restarts=3, seed=seed)
        assert 0.0 < found.value < INF and found.non_finite > 1

    def nan_but_at_w():
        return w.sum() + torch.where((w == 0.5).all(), 0.0, math.nan)

    with pytest.warns(UserWarning, match="6 of 6 points seen"):  # no ascent begins where the loss is NaN
        [found] = measure(nan_but_at_w, [("w", w)], [region], steps=3, restarts=4)
    assert found.value == INF and found.non_finite == 6

    def without_a_gradient_far_off():  # where no ascent goes on, as its next point would be NaN
        assert w.isfinite().all()
        return w.sum() if w[0] < 1 else w.sum() + (w - w.detach()).abs().sqrt().sum()

    with pytest.warns(UserWarning, match="a gradient that is not finite"):
        [found] = measure(without_a_gradient_far_off, [("w", w)], [region], steps=5, restarts=3)
    assert 0.0 < found.value < INF

    def cliff():
        return w[1] + torch.where(w[0] < 1, w[0], INF)

    with pytest.warns(UserWarning, match="not finite"):
        [found] = measure(cliff, [("w", w)], [region], steps=30, restarts=5)
    assert 0.9 < found.value < 0.5 + math.sqrt(0.75)  # which is where the cliff cuts the circle

    with pytest.raises(ValueError, match="the loss at w is nan"):
        measure(lambda: w.sum() * math.nan, [("w", w)], [region])
    with pytest.raises(ValueError, match="its gradient is not finite"):
        measure(lambda: (w - w.detach()).abs().sqrt().sum(), [("w", w)], [region])


def test_one_step_takes_one_gradient_however_many_regions_there_are():
    w, with_gradient = nn.Parameter(torch.ones(2)), []

    def loss():
        with_gradient.append(torch.is_grad_enabled())
        return w.square().sum()

    measure(loss, [("w", w)], [Region(0.1), Region(0.2)])
    assert with_gradient == [True, False, False]


def test_bad_values_are_refused():
    w = nn.Parameter(torch.ones(2))
    for options, message in (
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2, "restarts": 0}, "restarts is 0"),
        ({"restarts": 3}, "one ascent step has one start"),
        ({"steps": 2, "regions": [Region(0.1, p=3.0)]}, "needs p = 2 or p = inf"),
        ({"loss": list}, "mean over nothing"),
        ({"weights": [("w", torch.ones(2))]}, "no parameter to perturb"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(**{"loss": w.sum, "weights": [("w", w)], "regions": [Region(0.1)], **options})
    with pytest.raises(ValueError, match="rho is -1"):
        Region(-1.0)


def test_a_loss_of_other_weights_is_refused():
    measured, other = nn.Linear(3, 1), nn.Linear(3, 1)
    with pytest.raises(ValueError, match="the loss depends on none of the weights"):
        measure(lambda: other(torch.ones(2, 3)).square().mean(), measured, [Region(0.1)])


@pytest.mark.parametrize("wrong", [lambda loss: (loss, 4), lambda loss: loss.item()])
def test_a_loss_of_another_kind_is_refused(wrong):
    model = nn.Linear(4, 2)
    with pytest.raises(TypeError, match="must return a tensor, or pairs in a list or by yield"):
        measure(lambda: wrong(model(torch.ones(4, 4)).square().sum()), model, [Region(0.1)])


def test_random_starts_are_uniform_in_the_region():
    """Then the share of the volume within a point's radius, (r / rho)^d, is uniform over 0 to 1."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    ball = _Ball({weight: "w"}, Region(rho=0.2, normalization="none"))
    generator = torch.Generator().manual_seed(0)
    points = [ball.random_point(generator)[0] for _ in range(2000)]
    shares = (torch.stack(points).norm(dim=1) / 0.2) ** 3
    quarters = torch.quantile(shares, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quarters, torch.tensor([0.25, 0.5, 0.75]).double(), rtol=0, atol=0.05)
    mean = torch.stack(points).mean(dim=0)
    torch.testing.assert_close(mean, torch.zeros(3).double(), rtol=0, atol=0.02)


def test_random_starts_are_uniform_in_the_cube():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    ball = _Ball({weight: "w"}, Region(rho=0.2, p=math.inf, normalization="none"))
    generator = torch.Generator().manual_seed(0)
    points = torch.stack([ball.random_point(generator)[0] for _ in range(2000)])
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    quarters = torch.quantile(points, shares, dim=0)
    expected = (0.4 * shares - 0.2)[:, None].expand(-1, 3)
    torch.testing.assert_close(quarters, expected, rtol=0, atol=0.02)
