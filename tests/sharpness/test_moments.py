"""Epsilon made of a base optimizer's moments: the direction of momentum and Adam's metric, by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from fairseq_asam import Perturbation, SharpnessAware
from fairseq_asam.sharpness.moments import first_moments

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

    With the direction momentum, g = -m. The first update has no moments, and no epsilon made of them.
    """
    model = setting()
    weights = dict(model.named_parameters())
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t in range(1, updates + 1):
        w = {name: weight.detach().clone() for name, weight in weights.items()}
        if t > 1:
            if direction == "momentum":
                ascent = {n: -m[n] for n in w}
            else:
                ascent = dict(zip(w, torch.autograd.grad(loss_of(model, t), list(weights.values()))))
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


@pytest.mark.parametrize(
    "base, normalization, direction",
    [
        (adam, "none", "momentum"),
        (adam, "element-wise", "momentum"),
        (sgd, "none", "momentum"),
        (sgd, "element-wise", "momentum"),
        (adam, "adam", "gradient"),
        (adam, "adam", "momentum"),
    ],
)
def test_twenty_updates(base, normalization, direction):
    model = setting()
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
        assert loss == losses[-1 if direction == "momentum" else -2]
    if direction == "momentum":
        assert len(losses) == 20 and optimizer.sharpness is None
    else:
        assert len(losses) == 40 and optimizer.sharpness == losses[-1] - losses[-2]
    for weight, expected in zip(model.parameters(), by_hand(base.__name__, normalization, direction, 20)):
        torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12)


def test_in_a_loop_of_one_s_own_epsilon_has_length_rho():
    """And the weights come back bit for bit."""
    model = setting()
    optimizer = adam(model.parameters())
    moments = functools.partial(first_moments, optimizer)
    perturbation = Perturbation(model.named_parameters(), RHO, normalization="none", moments=moments)
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
    """As one that has been unfrozen."""
    model = setting()
    model[2].weight.requires_grad_(False)
    optimizer = adam(model.parameters())
    loss_of(model, 1).backward()
    optimizer.step()
    model[2].weight.requires_grad_(True)
    moments = functools.partial(first_moments, optimizer)
    before = [w.detach().clone() for w in model.parameters()]
    with Perturbation(model.named_parameters(), RHO, moments=moments):
        moved = [not torch.equal(w, b) for w, b in zip(model.parameters(), before)]
    assert moved == [True, True, False, True]


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


def test_bad_input_is_refused():
    model = setting()
    for base in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.RMSprop(model.parameters())):
        with pytest.raises(ValueError, match=f"^{type(base).__name__} keeps no first moment"):
            SharpnessAware(base, model, rho=0.1, direction="momentum")
    with pytest.raises(ValueError, match="direction is 'up', but it must be one of gradient, momentum"):
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
    with pytest.raises(ValueError, match="normalization is 'adam', but it must be one of none"):
        Perturbation(model.named_parameters(), 0.1, normalization="adam")
    adagrad = torch.optim.Adagrad(model.parameters())
    loss_of(model, 1).backward()
    adagrad.step()
    with pytest.raises(ValueError, match="Adagrad keeps no first moment"):
        first_moments(adagrad)
