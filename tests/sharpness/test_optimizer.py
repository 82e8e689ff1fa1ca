"""SharpnessAware: trajectories known in closed form, delegation to the base, faults."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

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


@pytest.mark.parametrize("options", [{}, {"direction": "momentum"}, {"normalization": "adam"}], ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_with_a_scheduler_steps_itself(copied, options):
    """A scheduler puts a `step` into the optimizer that steps the original."""
    model, optimizer = setting(adam, rho=0.1, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, range(3))
    other_model, other, other_scheduler = copied((model, optimizer, scheduler))
    before = weights(model)
    train(other_model, other, range(3, 6))
    assert torch.equal(weights(model), before)
    train(model, optimizer, range(3, 6))
    assert torch.equal(weights(model), weights(other_model))
    other_scheduler.step()
    assert other.base.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"] / 2


def test_hooks_run_and_are_left_out_of_copies():
    """As torch's own optimizers have it."""
    model, optimizer = setting(adam, rho=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("saves"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {k: v for k, v in state.items() if k != "note"}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert state["note"] == 1 and seen == ["step", "saves", "loaded"]
    other = pickle.loads(pickle.dumps(optimizer))
    other.load_state_dict(other.state_dict())
    assert len(seen) == 3


def test_modes_of_a_schedule_free_base():
    class ScheduleFree(torch.optim.SGD):
        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    _, optimizer = setting(lambda p: ScheduleFree(p, lr=0.1), rho=0.1)
    for mode in ("train", "eval"):
        getattr(optimizer, mode)()
        assert optimizer.base.mode == mode
    _, optimizer = setting(adam, rho=0.1)
    assert not hasattr(optimizer, "train") and not hasattr(optimizer, "eval")


def test_a_base_without_defaults():
    class Wrapper:
        """Has what a step needs alone, as wrappers of optimizers do."""

        def __init__(self, base):
            self.param_groups, self.state, self.step = base.param_groups, base.state, base.step
            self.zero_grad = base.zero_grad

    model, optimizer = setting(lambda p: Wrapper(adam(p)), rho=0.1)
    same, other = setting(adam, rho=0.1)
    train(model, optimizer, range(3))
    train(same, other, range(3))
    assert torch.equal(weights(model), weights(same))


@pytest.mark.parametrize("wrapped", ["model", "last layer"])
def test_all_weights_of_the_loss_get_the_gradient_at_w_plus_epsilon(wrapped):
    """Those that the base has and the module lacks, and those that neither has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    factor = nn.Parameter(torch.tensor(2.0).double())
    inputs, known = torch.randn(16, 4).double(), [*model.parameters(), factor]
    part = model if wrapped == "model" else model[2]
    trained = [*part.parameters(), factor] if wrapped == "model" else part.parameters()
    optimizer = SharpnessAware(torch.optim.SGD(trained, lr=0.0), part, rho=0.5)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(torch.autograd.grad((model(inputs) * factor).square().mean(), known))
        loss = (model(inputs) * factor).square().mean()
        loss.backward()
        return loss

    for step in range(2):
        for weight in known:
            weight.grad = None
        optimizer.step(closure)
        for weight, gradient in zip(known, seen[2 * step + 1]):
            torch.testing.assert_close(weight.grad, gradient)


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
    before, calls = weights(model), 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum() * (math.inf if calls == 1 else 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert torch.equal(weights(model), before)


def regression(weights="pairs", base=lambda p: torch.optim.SGD(p, lr=1.0), **options):
    """A layer, its optimizer, and a function that computes the loss of one fixed batch and its gradient."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4).double()
    given = model if weights == "module" else model.named_parameters()
    optimizer = SharpnessAware(base(model.parameters()), given, rho=0.5, **options)
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).double()

    def backward():
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        return loss

    return model, optimizer, backward


def clearing(optimizer, backward, set_to_none=True):
    """The closure that torch's documentation asks for."""

    def closure():
        optimizer.zero_grad(set_to_none)
        return backward()

    return closure


def stepped():
    """The weights after two right steps."""
    model, optimizer, backward = regression()
    for _ in range(2):
        optimizer.step(clearing(optimizer, backward))
    return weights(model)


@pytest.mark.parametrize("weights_given", ["module", "pairs"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_clears_the_gradients(weights_given, set_to_none):
    """Also after a call of it for the log, and where an earlier step's gradients are zeroed in place."""
    model, optimizer, backward = regression(weights_given)
    closure = clearing(optimizer, backward, set_to_none)
    closure()
    optimizer.step(closure)
    optimizer.zero_grad(set_to_none)
    optimizer.step(closure)
    assert torch.equal(weights(model), stepped())


def test_a_step_under_no_grad_is_the_same():
    """As torch's own optimizers allow it."""
    model, optimizer, backward = regression()
    closure = clearing(optimizer, backward, True)
    with torch.no_grad():
        optimizer.step(closure)
        optimizer.step(closure)
    assert torch.equal(weights(model), stepped())


def test_the_step_is_that_of_davda54_s_adaptive_sam():
    """With the arguments that README.md names: e = rho w^2 g / || |w| g ||, for biases too."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    theirs, batches = copy.deepcopy(ours), torch.randn(5, 6, 4).double()
    base = torch.optim.SGD(ours.parameters(), lr=0.1)
    optimizer = SharpnessAware(base, ours, rho=2.0, eta=0.0, normalize_bias=True)
    for inputs in batches:

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = ours(inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        w = [each.detach().clone() for each in theirs.parameters()]
        for moved in (False, True):
            g = torch.autograd.grad(theirs(inputs).square().mean(), [*theirs.parameters()])
            norm = sum((a.abs() * b).square().sum() for a, b in zip(w, g)).sqrt()
            for each, a, b in zip(theirs.parameters(), w, g):
                each.data = a - 0.1 * b if moved else a + 2.0 * a**2 * b / norm
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_closure_that_leaves_the_clearing_to_the_optimizer():
    """As davda54/sam's, but for the backward() before the step."""
    model, optimizer, backward = regression()
    for _ in range(2):
        optimizer.step(backward)
    assert torch.equal(weights(model), stepped())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed_gradients_are_none_of_the_caller_s(set_to_none):
    model, optimizer, backward = regression()
    for _ in range(2):
        optimizer.zero_grad(set_to_none)
        optimizer.step(backward)
    assert torch.equal(weights(model), stepped())


@pytest.mark.parametrize("steps_before", [0, 1])
def test_gradients_that_the_closure_neither_made_nor_cleared_are_refused(steps_before):
    """Of a backward() before the step (davda54/sam), or of micro-batches that a trainer accumulates."""
    model, optimizer, backward = regression()
    for _ in range(steps_before):
        optimizer.step(backward)
    backward()
    before, gradient = weights(model), model.weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"neither made nor cleared.*drop the backward\(\) before step"):
        optimizer.step(backward)
    assert torch.equal(weights(model), before) and torch.equal(model.weight.grad, gradient)
    optimizer.zero_grad()
    optimizer.step(backward)
    assert not torch.equal(weights(model), before)


def test_before_a_late_start_steps_are_those_of_the_base():
    """And after it those of one that begins with the base's state."""
    model, optimizer = setting(adam, rho=0.1)
    optimizer.ascends = False
    train(model, optimizer, range(10))
    assert optimizer.sharpness is None
    plain, late = setting(adam, rho=0.1)
    train(plain, late.base, range(10))
    assert torch.equal(weights(model), weights(plain))

    optimizer.ascends = True
    train(model, optimizer, range(10, 20))
    train(plain, late, range(10, 20))
    assert torch.equal(weights(model), weights(plain)) and optimizer.sharpness > 0


def test_before_a_late_start_a_closure_without_a_loss_is_refused():
    model, optimizer, backward = regression()
    optimizer.ascends = False
    before = weights(model)
    with pytest.raises(TypeError, match="it must return the loss"):
        optimizer.step(lambda: backward() and None)
    assert torch.equal(weights(model), before)


def test_a_float_counts_as_a_loss():
    model, optimizer, backward = regression()
    closure = clearing(optimizer, backward)
    assert isinstance(optimizer.step(lambda: closure().item()), float)
    assert isinstance(optimizer.sharpness, float) and optimizer.sharpness > 0
    optimizer.step(closure)
    assert torch.equal(weights(model), stepped())


def test_a_closure_without_a_loss_or_without_a_gradient_is_refused_before_the_step():
    model, optimizer, backward = regression()
    before = weights(model)
    with pytest.raises(TypeError, match="it must return the loss"):
        optimizer.step(lambda: backward() and None)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="make no update for a batch that you skip"):
        optimizer.step(lambda: model.weight.sum())
    assert torch.equal(weights(model), before)


def test_a_gradient_scaler_is_refused_and_the_optimizer_goes_on():
    model, optimizer, backward = regression()
    scaler, before = torch.amp.GradScaler("cpu"), weights(model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8).double()).square().mean()
        scaler.scale(loss).backward()
        return loss

    closure()
    with pytest.raises(RuntimeError, match=r"GradScaler.step\(optimizer, closure\).*scaler.step\(base\)"):
        scaler.step(optimizer, closure)
    assert torch.equal(weights(model), before)
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.step(backward)
    assert torch.equal(weights(model), stepped())


def test_torch_s_distributed_checkpoints_take_a_fresh_optimizer():
    model, optimizer = setting(adam, rho=0.1)
    other_model, other = setting(adam, rho=0.1)
    train(other_model, other, range(3))
    state = copy.deepcopy(get_optimizer_state_dict(other_model, other))
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state)
    model.load_state_dict(other_model.state_dict())
    train(model, optimizer, range(3, 6))
    train(other_model, other, range(3, 6))
    assert torch.equal(weights(model), weights(other_model))


def test_maximizing_is_minimizing_the_negated_loss():
    model, optimizer, _ = regression(base=lambda p: torch.optim.SGD(p, lr=1.0, maximize=True))

    def negated():
        loss = -(model(torch.eye(8).double()) - 1).square().mean()
        loss.backward()
        return loss

    expected_model, expected, _ = regression()

    def closure():
        loss = (expected_model(torch.eye(8).double()) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(negated)
        expected.step(closure)
    assert torch.equal(weights(model), weights(expected_model))
    optimizer.param_groups.append({**optimizer.param_groups[0], "maximize": False})
    with pytest.raises(ValueError, match="one epsilon has one objective"):
        optimizer.step(negated)


def test_a_group_need_not_say_that_it_minimizes():
    class Plain(torch.optim.Optimizer):
        def step(self):
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data -= weight.grad

    model, _, closure = regression()
    base = Plain([{"params": [model.weight], "maximize": False}, {"params": [model.bias]}], {})
    before = weights(model)
    SharpnessAware(base, model, rho=0.5).step(closure)
    assert not torch.equal(weights(model), before)


def test_weights_unfrozen_later_are_perturbed():
    model, optimizer, backward = regression()
    model.weight.requires_grad_(False)
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters(), rho=0.5)
    for frozen in (True, False):
        model.weight.requires_grad_(not frozen)
        seen = []
        optimizer.step(lambda seen=seen: seen.append(model.weight.detach().clone()) or backward())
        assert torch.equal(*seen) == frozen


@pytest.mark.parametrize("weights_given", ["module", "pairs"])
def test_both_passes_draw_the_same_masks_and_the_statistics_are_those_of_w(weights_given):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4)).double()
    given = model if weights_given == "module" else model.named_parameters()
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), given, rho=2.0)
    inputs, kept, normalized = torch.randn(16, 8).double(), [], []
    model[1].register_forward_pre_hook(lambda layer, given: normalized.append(given[0].detach()))
    model[2].register_forward_hook(lambda layer, given, dropped: kept.append(dropped != 0))

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    mean, variance = torch.zeros(16).double(), torch.ones(16).double()
    for step in range(1, 3):
        kept.clear()
        normalized.clear()
        optimizer.step(closure)
        assert torch.equal(*kept) and 0 < kept[0].sum() < kept[0].numel()
        at_w, perturbed = normalized
        assert (perturbed - at_w).abs().max() > 0.1
        mean = 0.9 * mean + 0.1 * at_w.mean(0)
        variance = 0.9 * variance + 0.1 * at_w.var(0)
        torch.testing.assert_close(model[1].running_mean, mean)
        torch.testing.assert_close(model[1].running_var, variance)
        assert model[1].num_batches_tracked == step


def test_misuse_is_refused():
    model, optimizer = setting(adam, rho=0.1)
    for arguments in ((), (None,)):
        with pytest.raises(TypeError, match=r"step\(\) needs a closure"):
            optimizer.step(*arguments)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(TypeError, match=r"step\(\) needs a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="LBFGS"):
        SharpnessAware(torch.optim.LBFGS(model.parameters()), model.named_parameters(), rho=0.1)
    with pytest.raises(ValueError, match="is SharpnessAware, which is sharpness-aware already"):
        SharpnessAware(optimizer, model.named_parameters(), rho=0.1)
    with pytest.raises(ValueError, match="rho is -1"):
        SharpnessAware(adam(model.parameters()), model.named_parameters(), rho=-1)
    with pytest.raises(NotImplementedError, match="add the group to the base"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_rho_is_that_of_the_perturbation():
    model = nn.Linear(4, 2)
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.1)
    optimizer.rho = 0.7
    assert optimizer.rho == optimizer.perturbation.rho == 0.7
    with pytest.raises(ValueError, match="rho is -1"):
        optimizer.rho = -1.0


def test_a_rho_in_a_parameter_group_is_refused_but_that_of_adadelta():
    model = nn.Linear(4, 2)

    def step(base):
        optimizer = SharpnessAware(base, model, rho=0.1)

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        return optimizer.step(closure)

    step(torch.optim.Adadelta(model.parameters(), rho=0.9))
    with pytest.raises(ValueError, match=r"a parameter group has a rho.*set optimizer\.rho"):
        step(torch.optim.SGD([{"params": model.parameters(), "rho": 0.3}], lr=0.1))


def test_a_hook_before_loading_changes_a_copy_of_the_state_dict():
    w = nn.Parameter(torch.ones(3))
    optimizer = SharpnessAware(torch.optim.SGD([w], lr=0.1), [("w", w)], rho=0.1)
    optimizer.register_load_state_dict_pre_hook(lambda optimizer, state_dict: state_dict.clear())
    saved = optimizer.state_dict()
    with pytest.raises(KeyError):  # the base gets what the hook has left
        optimizer.load_state_dict(saved)
    assert saved == optimizer.state_dict()
