"""torch's ZeroRedundancyOptimizer, which shares out the optimizer's state, with every order of wrapping."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from fairscale.optim.oss import OSS
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fairseq_asam import Momentum, Perturbation, SharpnessAware, TwoPasses, adam_diagonals
from tests.processes import in_processes

UPDATES, RHO = 20, 0.5
ADAM = (torch.optim.Adam, {"lr": 0.02})
SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6), nn.LayerNorm(6), nn.Linear(6, 1)
    return nn.Sequential(*layers).to(dtype)


def loss_of(model, x):
    loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
    loss.backward()
    return loss


def plain(model, base, options):
    return base(model.parameters(), **options)


def ours(model, base, options):
    return SharpnessAware(base(model.parameters(), **options), model, RHO)


def theirs(model, base, options, **more):
    return ZeroRedundancyOptimizer(model.parameters(), base, **more, **options)


def ours_around_theirs(model, base, options, **more):
    return SharpnessAware(theirs(model, base, options, **more), model, RHO)


def theirs_around_ours(model, base, options):
    def of_part(parameters, **defaults):
        return SharpnessAware(base(parameters, **defaults), model, RHO)

    return ZeroRedundancyOptimizer(model.parameters(), of_part, **options)


WRAPPINGS = {
    "ours around theirs": ours_around_theirs,
    "ours around theirs in buckets": functools.partial(ours_around_theirs, parameters_as_bucket_view=True),
    "theirs in a loop": theirs,
    "theirs in buckets in a loop": functools.partial(theirs, parameters_as_bucket_view=True),
    "theirs around ours": theirs_around_ours,
}


def step(optimizer, model, x, two_passes=None):
    """Make an update, with *two_passes* in a loop as users write it."""

    def closure():
        optimizer.zero_grad()
        return loss_of(model, x)

    if two_passes is None:
        return optimizer.step(closure)
    two_passes(lambda: loss_of(model, x))
    optimizer.step()
    optimizer.zero_grad()


def trained(model, optimizer, updates=range(UPDATES), in_loop=False):
    """The weights after the updates; a model of DistributedDataParallel has a share of each batch."""
    two_passes = TwoPasses(Perturbation(model.named_parameters(), RHO), [model]) if in_loop else None
    for update in updates:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(update), dtype=torch.float64)
        x = x.to(next(model.parameters()))
        if isinstance(model, DistributedDataParallel):
            x = x.chunk(dist.get_world_size())[dist.get_rank()]
        step(optimizer, model, x, two_passes)
    return torch.cat([w.detach().flatten().double() for w in model.parameters()])


def differences(dtype):
    """How far the weights are from those of one process with the whole batch."""
    found = {}
    for base in (ADAM, SGD):
        alone = {}
        for make in (plain, ours):
            model = network(dtype)
            alone[make] = trained(model, make(model, *base))
        assert (alone[plain] - alone[ours]).abs().max() > 1e-3
        for name, make in {"base": plain, **WRAPPINGS}.items():
            model = DistributedDataParallel(network(dtype))
            weights = trained(model, make(model, *base), in_loop="loop" in name)
            difference = weights - alone[plain if make is plain else ours]
            found[name, base[0].__name__] = difference.norm().item()
    return found


def test_twenty_updates_are_those_of_one_process_with_the_whole_batch():
    for found in in_processes(2, differences, torch.float64):
        assert len(found) == 2 * (1 + len(WRAPPINGS))
        assert max(found.values()) < 1e-12, found


def test_in_float32_they_differ_no_more_than_those_of_the_base():
    """Four times as much is allowed: that of a single run changes as much with any change in rounding."""
    for found in in_processes(2, differences, torch.float32):
        for (name, base), difference in found.items():
            assert difference <= 4 * found["base", base], (name, base, found)


def resumed(_):
    """For each wrapping, how far from the uninterrupted run one ends that was saved half way, resumed in the
    same wrapping and by one process alone; and how many states this process and the checkpoint had."""
    found = {}
    half, rest = range(UPDATES // 2), range(UPDATES // 2, UPDATES)
    for name in ("ours around theirs", "theirs around ours"):
        make = WRAPPINGS[name]
        model = DistributedDataParallel(network())
        optimizer = make(model, *ADAM)
        trained(model, optimizer, half)
        saved = [None]
        zero = getattr(optimizer, "base", optimizer)
        zero.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            saved = [(model.module.state_dict(), optimizer.state_dict())]
        dist.broadcast_object_list(saved)
        saved = copy.deepcopy(saved)
        uninterrupted = trained(model, optimizer, rest)
        runs = {}
        for one in (False, True):
            weights, state = copy.deepcopy(saved[0])
            again = network()
            again.load_state_dict(weights)
            again = again if one else DistributedDataParallel(again)
            other = (ours if one else make)(again, *ADAM)
            other.load_state_dict(state)
            runs[one] = (trained(again, other, rest) - uninterrupted).abs().max().item()
        found[name] = (runs[False], runs[True], len(zero.optim.state), len(saved[0][1]["state"]))
    return found


def test_a_consolidated_state_resumes_sharded_and_whole():
    for found in in_processes(2, resumed, None):
        for sharded, whole, states, saved in found.values():
            assert sharded == 0.0 and whole < 1e-12
            assert 0 < states < saved == len(list(network().parameters()))


def refusals(_):
    """What is said, and whether the weights moved."""
    said = {}

    def attempt(case, make, use=lambda optimizer, model: None):
        model = DistributedDataParallel(network())
        try:
            use(make(model), model)
            said[case] = ["nothing"]
        except (ValueError, TypeError, RuntimeError) as error:
            said[case] = [str(error)]
        said[case].append(all(map(torch.equal, model.parameters(), network().parameters())))

    def step_in_join(optimizer, model):
        with Join([model, optimizer.base]):
            trained(model, optimizer, range(1 + dist.get_rank()))

    def step_in_the_block(zero, model):
        loss_of(model, torch.ones(2, 6, dtype=torch.float64))
        with Perturbation(model.named_parameters(), RHO):
            zero.step()

    attempt("overlap", lambda model: ours_around_theirs(model, *ADAM, overlap_with_ddp=True))
    attempt("LBFGS", lambda model: ours_around_theirs(model, torch.optim.LBFGS, {}))
    attempt("class", lambda model: theirs(model, SharpnessAware, {"weights": model, "rho": RHO}))
    attempt("join", lambda model: ours_around_theirs(model, *ADAM), step_in_join)

    def step_along_momentum(zero, model):
        Perturbation(model.named_parameters(), RHO, direction=Momentum(zero))

    def with_averages(model):
        averager = PeriodicModelAverager(period=1)
        return PostLocalSGDOptimizer(torch.optim.Adam(model.parameters()), averager)

    def step_in_adams_metric(zero, model):
        loss_of(model, torch.ones(2, 6, dtype=torch.float64))
        diagonals = functools.partial(adam_diagonals, zero)
        with Perturbation(model.named_parameters(), RHO, diagonals=diagonals):
            pass

    attempt("momentum in a loop", lambda model: theirs(model, *ADAM), step_along_momentum)
    attempt("Adam's metric in a loop", lambda model: theirs(model, *ADAM), step_in_adams_metric)
    attempt("step in the block", lambda model: theirs(model, *ADAM), step_in_the_block)
    attempt("OSS", lambda model: OSS(model.parameters(), *ADAM[:1], **ADAM[1]), step_along_momentum)
    attempt("PostLocalSGD", with_averages, step_along_momentum)
    return said


@pytest.mark.parametrize(
    "case, sentence",
    [
        ("overlap", "ZeroRedundancyOptimizer with overlap_with_ddp=True steps in every backward pass"),
        ("LBFGS", "LBFGS evaluates the closure at points of its own"),
        ("class", "base is a list, but it must be an optimizer: pass one, such as torch.optim.Adam"),
        ("join", "in a Join context, ZeroRedundancyOptimizer steps once for each forward pass of another"),
        ("momentum in a loop", "ZeroRedundancyOptimizer has only a part of the weights' moments"),
        ("Adam's metric in a loop", "ZeroRedundancyOptimizer has only a part of the weights' moments"),
        ("OSS", "OSS has only a part of the weights' moments"),
        ("PostLocalSGD", "nothing"),
        ("step in the block", "ZeroRedundancyOptimizer would step with weights at w + epsilon"),
    ],
)
def test_what_does_not_work_is_refused_before_weights_move(case, sentence):
    for said in said_on_each():
        message, unmoved = said[case]
        assert message.startswith(sentence) and unmoved


@functools.cache
def said_on_each():
    return in_processes(2, refusals, None)
