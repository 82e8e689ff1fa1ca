"""SharpnessAware: trajectories known in closed form, delegation to the base, faults."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fairseq_asam import SharpnessAware


def quadratic(curvatures, start, rho, **options):
    """The trajectory of SGD on sum_i h_i w_i^2 / 2, as a function from step to w."""
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    h = torch.tensor(curvatures, dtype=torch.float64)
    optimizer = SharpnessAware(torch.optim.SGD([w], lr=0.1), [("w", w)], rho=rho, **options)

    def closure():
        optimizer.zero_grad()
        loss = (h * w * w).sum() / 2
        loss.backward()
        return loss

    trajectory = [w.detach().clone()]
    for _ in range(30):
        optimizer.step(closure)
        trajectory.append(w.detach().clone())
    return trajectory


def test_sam_on_a_quadratic():
    """One dimension: w' = w - a h (w + rho sign w), so |w_t| + rho = (1 - a h)^t (|w_0| + rho)."""
    for start in (2.0, -2.0):
        trajectory = quadratic([0.3], [start], rho=0.05, normalization="none")
        for t, w in enumerate(trajectory):
            expected = math.copysign((1 - 0.1 * 0.3) ** t * (2.0 + 0.05) - 0.05, start)
            assert w.item() == pytest.approx(expected, rel=1e-12)


def test_asam_on_a_quadratic():
    """p = inf, eta = 0: epsilon_i = rho |w_i| sign(h_i w_i) = rho w_i for every i, so every coordinate
    shrinks by 1 - a h_i (1 + rho) a step. One dimension with p = 2 is the same."""
    for curvatures, start, p in (([0.3], [-2.0], 2.0), ([0.3, 5.0, 0.01], [-2.0, 0.5, 1e3], math.inf)):
        trajectory = quadratic(curvatures, start, rho=0.2, eta=0.0, p=p)
        for t, w in enumerate(trajectory):
            for h, w_0, w_t in zip(curvatures, start, w.tolist()):
                assert w_t == pytest.approx(w_0 * (1 - 0.1 * h * 1.2) ** t, rel=1e-12)


def setting(make_base, **options):
    """A model, its optimizer and a closure; the closure's loss depends on the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = SharpnessAware(make_base(model.parameters()), model.named_parameters(), **options)
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs[:, :2].sin()).pow(2).mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
    return loss


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, weight_decay=1e-4)


def weights(model):
    return torch.cat([w.detach().flatten() for w in model.parameters()])


@pytest.mark.parametrize(
    "make_base",
    [adam, torch.optim.RMSprop, torch.optim.Adagrad, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)],
)
def test_stopped_and_resumed_is_uninterrupted(make_base, tmp_path):
    model, optimizer = setting(make_base, rho=0.1)
    train(model, optimizer, range(20))
    uninterrupted = weights(model)

    model, optimizer = setting(make_base, rho=0.1)
    train(model, optimizer, range(10))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    model, optimizer = setting(make_base, rho=0.1)
    model_state, optimizer_state = torch.load(tmp_path / "checkpoint.pt")
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    train(model, optimizer, range(10, 20))
    assert torch.equal(weights(model), uninterrupted)


def test_state_dict_is_the_base_s_and_loads_into_it():
    model, optimizer = setting(adam, rho=0.1)
    train(model, optimizer, range(3))
    bare = adam(model.parameters())
    bare.load_state_dict(optimizer.state_dict())
    moments = [state["exp_avg"] for state in bare.state.values()]
    assert len(moments) == 4 and all(m.abs().sum() > 0 for m in moments)
    assert optimizer.state_dict().keys() == bare.state_dict().keys() == {"state", "param_groups"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_as_the_original_does(copied):
    original = setting(adam, rho=0.1)
    train(*original, range(3))
    model, optimizer = copied(original)
    for each in (original, (model, optimizer)):
        train(*each, range(3, 6))
    assert torch.equal(weights(model), weights(original[0]))
    train(model, optimizer, range(6, 7))
    assert not torch.equal(weights(model), weights(original[0]))


def test_rho_zero_is_the_base_optimizer():
    model, optimizer = setting(adam, rho=0.0)
    train(model, optimizer, range(10))
    wrapped = weights(model)
    model, optimizer = setting(adam, rho=0.3)
    base = optimizer.base
    for step in range(10):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        base.zero_grad()
        (model(inputs) - inputs[:, :2].sin()).pow(2).mean().backward()
        base.step()
    assert torch.equal(weights(model), wrapped)


def test_schedulers_reach_the_base():
    model, optimizer = setting(adam, rho=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, range(1))
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 5e-3
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 2.5e-3


def test_step_returns_the_loss_at_w_and_keeps_the_sharpness():
    model, optimizer = setting(adam, rho=0.5)
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    at_w = (model(inputs) - inputs[:, :2].sin()).pow(2).mean().item()
    assert train(model, optimizer, range(1)).item() == at_w
    assert optimizer.sharpness.item() > 0 and not optimizer.sharpness.requires_grad


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_a_closure_that_raises_leaves_weights_and_moments_alone(failing_pass):
    model, optimizer = setting(adam, rho=0.1)
    train(model, optimizer, range(3))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    calls = []

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        if len(calls) == failing_pass:
            raise MemoryError
        return loss

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert torch.equal(weights(model), before)
    for key, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments[name], state[key][name]) for name in moments)


def test_a_gradient_that_is_not_finite_does_not_stay_in_the_weights_at_learning_rate_zero():
    model, optimizer = setting(lambda p: torch.optim.SGD(p, lr=0.0), rho=0.1)
    before, bad = weights(model), iter([math.inf, 1.0, 1.0, 1.0])

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum() * next(bad)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert torch.equal(weights(model), before)


def test_misuse_is_refused():
    model, optimizer = setting(adam, rho=0.1)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(None)
    with pytest.raises(ValueError, match="LBFGS"):
        SharpnessAware(torch.optim.LBFGS(model.parameters()), model.named_parameters(), rho=0.1)
    with pytest.raises(ValueError, match="rho is -1"):
        SharpnessAware(adam(model.parameters()), model.named_parameters(), rho=-1)
    with pytest.raises(NotImplementedError, match="add the group to the base"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
