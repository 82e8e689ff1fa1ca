"""The directions of ascent, and Adam's metric, by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from fairseq_asam import DIRECTIONS, Perturbation, SharpnessAware, adam_diagonals
from fairseq_asam.sharpness.directions import Momentum, Random
from fairseq_asam.sharpness.moments import first_moments

from .plain_directions import TWO_PASSES, VECTORS

ETA, RHO, LR = 0.01, 0.3, 0.05


def inputs(step: int) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = inputs(step)
    return (model(x) - x[:, :2].sin()).pow(2).mean()


def setting() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def adam(parameters):
    return torch.optim.Adam(parameters, lr=LR, betas=(0.8, 0.95), eps=1e-6)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


def by_hand(base: str, normalization: str, direction: str, updates: int) -> list[torch.Tensor]:
    """epsilon = rho T^2 g / ||T g||, and a step of *base* with the gradient at w + epsilon.

    The first update has no moments, and no epsilon made of them.
    """
    model = setting()
    weights = dict(model.named_parameters())
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t in range(1, updates + 1):
        w = {name: weight.detach().clone() for name, weight in weights.items()}
        gradients = None
        if direction in TWO_PASSES:
            gradients = dict(zip(w, torch.autograd.grad(loss_of(model, t), model.parameters())))
        ascent = VECTORS[direction](
            gradients=gradients,
            moments=m if t > 1 else {},
            weights=w,
            seed=0,
            number=t - 1,
        )
        if ascent and (t > 1 or normalization != "adam"):
            T = {n: torch.ones_like(w[n]) for n in w}
            for n in w:
                if normalization == "adam":
                    T[n] = ((v[n] / (1 - 0.95 ** (t - 1))).sqrt() + 1e-6) ** -0.5
                elif normalization == "element-wise" and "bias" not in n:
                    T[n] = w[n].abs() + ETA
            norm = sum((T[n] * ascent[n]).square().sum() for n in w).sqrt()
            with torch.no_grad():
                for n, weight in weights.items():
                    weight += RHO * T[n] ** 2 * ascent[n] / norm
        gradients = torch.autograd.grad(loss_of(model, t), list(weights.values()))
        with torch.no_grad():
            for (n, weight), g in zip(weights.items(), gradients):
                if base == "sgd":
                    m[n] = 0.9 * m[n] + g
                    weight.copy_(w[n] - LR * m[n])
                else:
                    m[n], v[n] = 0.8 * m[n] + 0.2 * g, 0.95 * v[n] + 0.05 * g * g
                    m_hat, v_hat = m[n] / (1 - 0.8**t), v[n] / (1 - 0.95**t)
                    weight.copy_(w[n] - LR * m_hat / (v_hat.sqrt() + 1e-6))
    return list(model.parameters())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "base, normalization",
    [(adam, "none"), (adam, "element-wise"), (adam, "adam"), (sgd, "none"), (sgd, "element-wise")],
)
def test_twenty_updates(base, normalization, direction):
    """The passes, the loss that a step returns, and the weights."""
    model, passes = setting(), 2 if direction in TWO_PASSES else 1
    options = {"rho": RHO, "eta": ETA, "normalization": normalization}
    optimizer = SharpnessAware(base(model.parameters()), model, direction=direction, **options)
    losses = []
    for t in range(1, 21):

        def closure(t=t):
            optimizer.zero_grad()
            loss = loss_of(model, t)
            loss.backward()
            losses.append(loss.item())
            return loss

        loss = optimizer.step(closure).item()
        assert loss == losses[-passes]
    assert len(losses) == 20 * passes
    assert optimizer.sharpness == (losses[-1] - losses[-2] if passes == 2 else None)
    for weight, expected in zip(model.parameters(), by_hand(base.__name__, normalization, direction, 20)):
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12)


def test_in_a_loop_of_one_s_own_epsilon_has_length_rho():
    """And the weights come back bit for bit."""
    model = setting()
    optimizer = adam(model.parameters())
    momentum = Momentum(optimizer)
    perturbation = Perturbation(model.named_parameters(), RHO, normalization="none", direction=momentum)
    before = [w.detach().clone() for w in model.parameters()]
    with perturbation:
        assert all(map(torch.equal, model.parameters(), before))  # no moment yet
        loss_of(model, 1).backward()
    optimizer.step()
    before = [w.detach().clone() for w in model.parameters()]
    with perturbation:
        epsilon = torch.cat([(w - b).flatten() for w, b in zip(model.parameters(), before)])
    moment = torch.cat([optimizer.state[w]["exp_avg"].flatten() for w in model.parameters()])
    torch.testing.assert_close(epsilon, -RHO * moment / moment.norm(), rtol=1e-10, atol=1e-12)
    assert all(map(torch.equal, model.parameters(), before))


def test_a_weight_without_a_moment_is_left_alone():
    """As one that has been unfrozen, or that the optimizer steps by a rule without a moment."""
    model = setting()
    model[2].weight.requires_grad_(False)
    optimizer = adam(model.parameters())
    loss_of(model, 1).backward()
    optimizer.step()
    model[2].weight.requires_grad_(True)
    before = [w.detach().clone() for w in model.parameters()]
    with Perturbation(model.named_parameters(), RHO, direction=Momentum(optimizer)):
        moved = [not torch.equal(w, b) for w, b in zip(model.parameters(), before)]
    assert moved == [True, True, False, True]
    del optimizer.state[model[0].weight]["exp_avg"]
    with Perturbation(model.named_parameters(), RHO, direction=Momentum(optimizer)):
        moved = [not torch.equal(w, b) for w, b in zip(model.parameters(), before)]
    assert moved == [False, True, False, True]


def random_epsilons(count: int, **options) -> list[torch.Tensor]:
    """The epsilons of the first blocks with the direction random and these options of it."""
    model = setting()
    perturbation = Perturbation(
        model.named_parameters(), RHO, normalization="none", direction=Random(**options)
    )
    epsilons, before = [], nn.utils.parameters_to_vector(model.parameters()).detach()
    for _ in range(count):
        with perturbation:
            epsilons.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    return epsilons


def test_random_epsilons_have_length_rho_and_are_drawn_anew():
    """Without a gradient, by every block or by the number of the update, and from each seed others."""
    epsilons = random_epsilons(50, seed=1) + random_epsilons(50, seed=2)
    for epsilon in epsilons:
        torch.testing.assert_close(epsilon.norm().item(), RHO, rtol=1e-12, atol=0.0)
    cosines = torch.stack(epsilons) @ torch.stack(epsilons).T / RHO**2
    # 32 weights: cosines of independent Gaussian vectors have the mean 0 and the variance 1 / 32.
    others = cosines[~torch.eye(100, dtype=torch.bool)]
    assert others.abs().max() < 0.9 and abs(others.mean()) < 0.02
    assert others.var().item() == pytest.approx(1 / 32, rel=0.1)
    number = iter([7, 7, 2]).__next__
    seventh, again, second = random_epsilons(3, seed=1, number=number)
    assert torch.equal(seventh, again) and torch.equal(seventh, epsilons[7])
    assert torch.equal(second, epsilons[2])


def test_random_numbers_for_weights_in_half_precision_are_not_rounded():
    weight = nn.Parameter(torch.ones(9))
    half = nn.Parameter(torch.ones(9).bfloat16())
    drawn, for_half = (Random(seed=1).vectors({w: "w"})[w] for w in (weight, half))
    assert torch.equal(drawn, for_half)


def test_random_leaves_the_generator_of_torch_alone():
    """Of which dropout masks are drawn."""
    model = setting()
    state = torch.get_rng_state()
    with Perturbation(model.named_parameters(), RHO, direction=Random()):
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_in_adam_s_metric_epsilon_has_length_rho(amsgrad):
    """Over groups with values of their own. A weight that Adam has not stepped is left alone."""
    model = setting()
    first = {"params": model[0].parameters(), "betas": (0.9, 0.98), "eps": 1e-3}
    second = {"params": model[2].parameters(), "betas": (0.5, 0.6), "eps": 1e-5}
    optimizer = torch.optim.Adam([first, second], lr=LR, amsgrad=amsgrad)
    key = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
    model[2].bias.requires_grad_(False)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        (loss_of(model, step) / step**2).backward()
        optimizer.step()
    model[2].bias.requires_grad_(True)
    optimizer.zero_grad()
    loss_of(model, 4).backward()
    perturbation = SharpnessAware(optimizer, model, rho=RHO, normalization="adam").perturbation
    before = [w.detach().clone() for w in model.parameters()]
    with perturbation:
        *epsilons, of_bias = [(w - b).detach() for w, b in zip(model.parameters(), before)]
    assert not of_bias.any()
    square, slopes = 0.0, []
    for weight, epsilon, group in zip(model.parameters(), epsilons, (first, first, second)):
        v_hat = optimizer.state[weight][key] / (1 - group["betas"][1] ** 3)
        step_of_adam = weight.grad / (v_hat.sqrt() + group["eps"])
        square += (epsilon**2 * (v_hat.sqrt() + group["eps"])).sum()
        slopes.append((epsilon / step_of_adam).flatten())
    torch.testing.assert_close(square.sqrt().item(), RHO, rtol=1e-10, atol=0.0)
    slopes = torch.cat(slopes)
    torch.testing.assert_close(slopes, slopes[0].expand_as(slopes), rtol=1e-9, atol=0.0)
    assert slopes[0] > 0


@pytest.mark.skipif(
    not hasattr(torch.serialization, "add_safe_globals"), reason="torch 2.3 has no fused Adam on CPUs"
)
def test_in_adam_s_metric_a_step_that_the_scaler_skipped_is_none():
    """A fused Adam, which is called all the same, then has a state of no step."""
    model = setting().float()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    perturbation = Perturbation(
        model.named_parameters(), RHO, diagonals=functools.partial(adam_diagonals, optimizer)
    )
    norms = []
    for factor in (1e6, 1.0, 1.0):
        scaler.scale(factor * model(inputs(1).float()).square().mean()).backward()
        with perturbation:
            norms.append(perturbation.norm.item())
        scaler.step(optimizer)
        scaler.update(2.0**10)
        optimizer.zero_grad()
    assert [state["step"].item() for state in optimizer.state.values()] == [2.0] * len(optimizer.state)
    assert norms[1] == 0.0 and norms[2] > 0.0


class StepsElsewhere(torch.optim.Adam):
    """Keeps the number of its steps in the group, as *key*, as some Adams do."""

    def __init__(self, parameters, key):
        super().__init__(parameters, lr=LR, betas=(0.8, 0.95), eps=1e-6)
        self.key = key

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    self.state[p]["step"] = torch.tensor(float(group[self.key]))
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                group[self.key] = int(self.state[p].pop("step"))


def test_adam_s_metric_of_an_adam_that_counts_its_steps_in_the_group():
    trained = []
    for make in (adam, lambda p: StepsElsewhere(p, "step")):
        model = setting()
        optimizer = SharpnessAware(make(model.parameters()), model, rho=RHO, normalization="adam")
        for step in range(4):
            optimizer.step(functools.partial(closure_of, optimizer, model, step))
        trained.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    torch.testing.assert_close(*trained, rtol=1e-12, atol=1e-14)


def test_adam_s_metric_of_an_adam_that_keeps_some_steps_as_numbers():
    model = setting()
    base = adam(model.parameters())
    optimizer = SharpnessAware(base, model, rho=RHO, normalization="adam")
    optimizer.step(functools.partial(closure_of, optimizer, model, 0))
    before, state = adam_diagonals(base), base.state[next(model.parameters())]
    state["step"] = int(state["step"])
    after = adam_diagonals(base)
    assert before.keys() == after.keys() and all(torch.equal(before[w], after[w]) for w in before)


def closure_of(optimizer, model, step):
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


@pytest.mark.parametrize("kept", ["k", "two eps"])
def test_adam_s_metric_of_an_adam_that_keeps_something_else_is_refused(kept):
    model = setting()
    base = StepsElsewhere(model.parameters(), kept) if kept == "k" else adam(model.parameters())
    optimizer = SharpnessAware(base, model, rho=RHO, normalization="adam")
    optimizer.step(functools.partial(closure_of, optimizer, model, 0))
    if kept == "two eps":
        base.param_groups[0]["eps"] = (1e-30, 1e-3)
    before = [w.detach().clone() for w in model.parameters()]
    with pytest.raises(
        ValueError, match=f"{type(base).__name__} does not keep the number of its steps and one"
    ):
        optimizer.step(functools.partial(closure_of, optimizer, model, 1))
    assert all(torch.equal(w, b) for w, b in zip(model.parameters(), before))


@pytest.mark.parametrize("maximize", [False, True])
def test_momentum_points_where_the_optimizer_goes(maximize):
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    base = torch.optim.SGD([w], lr=0.1, momentum=0.9, maximize=maximize)
    optimizer = SharpnessAware(base, [("w", w)], rho=0.5, normalization="none", direction="momentum")
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        loss = w @ torch.tensor([3.0, 4.0], dtype=torch.float64)
        loss.backward()
        return loss

    optimizer.step(closure)
    stepped = w.detach().clone()
    optimizer.step(closure)
    torch.testing.assert_close(seen[1], stepped + 0.5 * stepped / stepped.norm())


def test_bad_input_is_refused():
    model = setting()
    some = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "momentum": 0.9}]
    for base in (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.SGD(some, lr=0.1),
        torch.optim.RMSprop(model.parameters()),
    ):
        with pytest.raises(ValueError, match=f"^{type(base).__name__} keeps no first moment"):
            SharpnessAware(base, model, rho=0.1, direction="momentum")
    with pytest.raises(ValueError, match=f"direction is 'up', but it must be one of {', '.join(DIRECTIONS)}"):
        SharpnessAware(adam(model.parameters()), model, rho=0.1, direction="up")
    with pytest.raises(ValueError, match="Adam has only a part of the weights' moments"):
        SharpnessAware(adam(model[0].parameters()), model, rho=0.1, direction="momentum")
    for base in (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adadelta(model.parameters()),
    ):
        with pytest.raises(ValueError, match=f"^{type(base).__name__} does not keep Adam's second moment"):
            SharpnessAware(base, model, rho=0.1, normalization="adam")
    with pytest.raises(ValueError, match="Adam has only a part of the weights' moments"):
        SharpnessAware(adam(model[0].parameters()), model, rho=0.1, normalization="adam")
    for direction in ("momentum", Momentum):
        with pytest.raises(
            ValueError, match=r"direction is .*but it must be an object of .*Momentum\(optimizer"
        ):
            Perturbation(model.named_parameters(), 0.1, direction=direction)
    with pytest.raises(
        ValueError, match=r"Momentum is made of what the base .* pass it, Momentum\(optimizer\)"
    ):
        Momentum()
    with pytest.raises(ValueError, match="normalization is 'adam', but it must be one of none"):
        Perturbation(model.named_parameters(), 0.1, normalization="adam")
    adagrad = torch.optim.Adagrad(model.parameters())
    loss_of(model, 1).backward()
    adagrad.step()
    with pytest.raises(ValueError, match="Adagrad keeps no first moment"):
        first_moments(adagrad)
