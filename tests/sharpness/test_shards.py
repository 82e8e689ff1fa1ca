"""Weights in shards: the epsilon, the update and the sharpness of one process with the whole batch."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from . import plain_epsilon

pytest.importorskip("torch", minversion="2.6", reason="fully_shard is public from torch 2.6 on")

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_asam import DIRECTIONS, NORMALIZATIONS, Perturbation, Region, SharpnessAware, TwoPasses, measure
from fairseq_asam.sharpness import cpu
from fairseq_asam.sharpness.directions import Random
from fairseq_asam.sharpness.moments import adam_diagonals
from tests.processes import in_processes

INF = math.inf
is_on_cpu = cpu.is_on_cpu
#: Shapes that split unevenly, and leave some processes without a part.
SHAPES = {
    "conv.weight": (3, 4, 2),
    "linear.weight": (5, 3),
    "linear.bias": (5,),
    "lstm.bias_ih_l0": (1,),
    "embedding.weight": (1, 6),
    "gain": (7,),
    "whole.weight": (4, 3),
}
#: Mesh shape and, for each of its dimensions, the dimension of the weights that it splits (None: copies).
LAYOUTS = {
    "rows": ((2,), (0,)),
    "columns": ((2,), (1,)),
    "rows over four": ((4,), (0,)),
    "copies of rows": ((2, 2), (None, 0)),
    "rows and columns": ((2, 2), (0, 1)),
    "rows of rows": ((2, 2), (0, 0)),
    "columns, copied": ((2, 2), (1, None)),
}


#: p, and whether biases are normalized.
NORMS = ((2.0, False), (2.0, True), (1.5, False), (INF, True))


def layouts(processes):
    return {name: layout for name, layout in LAYOUTS.items() if math.prod(layout[0]) == processes}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def random_weights():
    generator = torch.Generator().manual_seed(0)
    names = [*SHAPES, *(f"{name} gradient" for name in SHAPES)]
    drawn = [torch.randn(SHAPES[n.split(" ")[0]], generator=generator, dtype=torch.float64) for n in names]
    return dict(zip(SHAPES, drawn)), dict(zip(SHAPES, drawn[len(SHAPES) :]))


def sharded_weights(layout):
    mesh_shape, dims = layout
    mesh = init_device_mesh("cpu", mesh_shape)
    weights, gradients = random_weights()
    parameters = {}
    for name, weight in weights.items():
        if name == "whole.weight":
            parameters[name] = nn.Parameter(weight)
            parameters[name].grad = gradients[name]
            continue
        placements = [Replicate() if d is None or d >= weight.dim() else Shard(d) for d in dims]
        parameters[name] = nn.Parameter(distribute_tensor(weight, mesh, placements))
        if name == "gain":  # its gradient is in other shards than the weight, and is brought into them
            placements = [Replicate() for _ in dims]
        parameters[name].grad = distribute_tensor(gradients[name], mesh, placements)
    return parameters


def epsilons(processes):
    """The largest relative difference from the plain formula, for each layout, region and kind of device.

    The form for accelerators is computed on a CPU.
    """
    differences = {}
    weights, gradients = ({n: w.numpy() for n, w in each.items()} for each in random_weights())
    models = {name: sharded_weights(layout) for name, layout in layouts(processes).items()}
    if processes == 4:  # some weights on one mesh and some on another
        other = sharded_weights(LAYOUTS["rows and columns"])
        models["two meshes"] = {**models["rows over four"], "conv.weight": other["conv.weight"]}
    for name, parameters in models.items():
        before = {n: full(p.detach()).clone() for n, p in parameters.items()}
        for normalization, (p, bias), on_cpu in itertools.product(NORMALIZATIONS, NORMS, (True, False)):
            cpu.is_on_cpu = is_on_cpu if on_cpu else lambda tensor: False
            options = dict(rho=0.5, eta=0.01, p=p, normalization=normalization, normalize_bias=bias)
            perturbation = Perturbation(parameters.items(), **options)
            expected = plain_epsilon.epsilon(weights, gradients, **options)
            worst = 0.0
            for _ in range(2):  # with what is kept between steps
                with perturbation:
                    moved = {n: (full(w.detach()) - before[n]).numpy() for n, w in parameters.items()}
                largest = max(abs(epsilon).max() for epsilon in expected.values())
                worst = max(worst, *(abs(moved[n] - expected[n]).max() / largest for n in moved))
            back = all(torch.equal(full(w.detach()), before[n]) for n, w in parameters.items())
            differences[name, normalization, p, bias, on_cpu] = worst if back else INF
    cpu.is_on_cpu = is_on_cpu
    return differences


class Network(nn.Module):
    """Layers whose parts are uneven over two and over four processes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 2)
        self.up, self.down, self.out = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 1)
        self.norm = nn.LayerNorm(6)
        self.double()

    def forward(self, x):
        x = self.conv(self.embedding(x).transpose(1, 2)).mean(2)
        return self.out(self.norm(x + self.down(self.up(x).tanh())))


def network():
    torch.manual_seed(0)
    return Network()


def tokens(step, size=8):
    return torch.randint(7, (size, 5), generator=torch.Generator().manual_seed(step))


def loss_of(model, x):
    return (model(x) - x.double().mean(1, keepdim=True)).square().mean()


def fsdp(model, mesh=None, **options):
    for layer in (model.embedding, model.conv, model.up):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model, mesh):
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp_and_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return fsdp(tensor_parallel(model, mesh["tensor"]), mesh["data"])


def on_two_meshes(model):
    fully_shard(model.embedding, mesh=init_device_mesh("cpu", (4,)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))


#: How a model is put into shards, and how many different shares of a batch there are.
SHARDINGS = {
    2: {
        "fully_shard": (fsdp, 2),
        "fully_shard without release": (functools.partial(fsdp, reshard_after_forward=False), 2),
        "tensor parallel": (lambda m: tensor_parallel(m, init_device_mesh("cpu", (2,))), 1),
    },
    4: {
        "fully_shard": (fsdp, 4),
        "hybrid": (lambda m: fsdp(m, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))), 4),
        "fully_shard and tensor parallel": (fsdp_and_tensor_parallel, 2),
        "two meshes": (on_two_meshes, 4),
    },
}
#: The regions that four processes are tested with, which take long on two cores.
FEWER = (0, 3, 6, 8)
ADAM = functools.partial(torch.optim.Adam, lr=0.02, foreach=False)


def trained(model, options, share, shares, updates, accumulate=1, reduce_last=False):
    """The sharpness of each update, and the last gradient and weights.

    With *reduce_last*, gradients are whole, and are added up, until the last micro-batch of a pass.
    """
    optimizer = ADAM(model.parameters())
    direction = DIRECTIONS[options.get("direction", "gradient")](optimizer)
    in_adams_metric = options.get("normalization") == "adam"
    diagonals = functools.partial(adam_diagonals, optimizer) if in_adams_metric else None
    options = {k: v for k, v in options.items() if k != "direction" and v != "adam"}
    perturbation = Perturbation(model.named_parameters(), **options, direction=direction, diagonals=diagonals)
    two_passes = TwoPasses(perturbation, [model])
    seen = []
    for step in range(updates):
        for part in range(accumulate):
            x = tokens(step).chunk(accumulate)[part].chunk(shares)[share]

            def evaluate(x=x, is_last=part == accumulate - 1):
                if reduce_last:
                    model.set_requires_gradient_sync(is_last)
                    model.set_reshard_after_backward(is_last)
                loss = loss_of(model, x) / accumulate
                loss.backward()
                return loss

            (two_passes.at_w if direction.needs_pass_at_w else two_passes.one_pass)(evaluate)
        if direction.needs_pass_at_w:
            two_passes.at_w_plus_epsilon()
            seen.append(float(two_passes.sharpness))
        optimizer.step()
        if step < updates - 1:
            optimizer.zero_grad()
    gradients = {name: full(w.grad) for name, w in model.named_parameters()}
    return seen, gradients, {name: full(w.detach()) for name, w in model.named_parameters()}


REGIONS = [
    dict(rho=0.5, normalization=normalization, p=p)
    for normalization, p in [
        *itertools.product(NORMALIZATIONS, (2.0,)),
        ("element-wise", INF),
        ("layer-wise", 3.0),
    ]
]
REGIONS += [dict(rho=0.5, direction="momentum"), dict(rho=0.1, normalization="adam")]
REGIONS += [dict(rho=0.5, direction="random")]


def trainings(processes, updates):
    """The largest difference from one process, for each sharding and region."""
    differences = {}

    @functools.cache
    def on_one_process(number, accumulate):
        return trained(network(), REGIONS[number], 0, 1, updates, accumulate)

    for (name, (shard, shares)), (number, options), (accumulate, *reduce_last) in itertools.product(
        SHARDINGS[processes].items(), enumerate(REGIONS), ((1,), (2,), (2, True))
    ):
        if (accumulate == 2 and number) or (processes == 4 and number not in FEWER):
            continue
        if reduce_last and name != "fully_shard":
            continue
        how = (updates, accumulate, *reduce_last)
        share = dist.get_rank() * shares // processes
        _, gradients, weights = trained(shard(network()), options, share, shares, *how)
        _, expected_gradients, expected = on_one_process(number, accumulate)
        of_weights = max((weights[n] - w).abs().max().item() for n, w in expected.items())
        of_gradients = max((gradients[n] - g).abs().max().item() for n, g in expected_gradients.items())
        differences[name, tuple(options.values()), how] = (of_weights, of_gradients)
    return differences


def trainings_in_float32(processes):
    """The distance from one process over 20 updates, without epsilon and with, for each sharding."""
    distances = {}
    for name, (shard, shares) in SHARDINGS[processes].items():
        share = dist.get_rank() * shares // processes
        of_rho = []
        for rho in (0.0, 0.5):
            *_, sharded = trained(shard(network().float()), {"rho": rho}, share, shares, updates=20)
            *_, whole = trained(network().float(), {"rho": rho}, 0, 1, updates=20)
            of_rho.append(sum((sharded[n] - w).square().sum().item() for n, w in whole.items()) ** 0.5)
        distances[name] = of_rho
    return distances


@functools.cache
def results(function, processes, *arguments):
    return in_processes(processes, function, processes, *arguments)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_epsilon_is_that_of_whole_weights(normalization, processes):
    for on_one in results(epsilons, processes):
        mine = {key: value for key, value in on_one.items() if key[1] == normalization}
        assert len(mine) == (len(layouts(processes)) + (processes == 4)) * len(NORMS) * 2
        assert max(mine.values()) < 1e-12, max(mine, key=mine.get)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("updates", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_updates_are_those_of_one_process_with_the_whole_batch(processes, updates):
    for on_one in results(trainings, processes, updates):
        for key, (of_weights, of_gradients) in on_one.items():
            assert of_weights < 1e-12 and of_gradients < 1e-11, key
        regions = len(REGIONS) if processes == 2 else len(FEWER)
        assert len(on_one) == len(SHARDINGS[processes]) * (regions + 1) + 1


def after_a_forward_pass_alone(processes):
    """What is said of weights that are whole then, and whether SharpnessAware puts them back itself."""
    model, x = fsdp(network()), tokens(0).chunk(processes)[dist.get_rank()]
    model(x)
    perturbation = Perturbation(model.named_parameters(), 0.5)
    try:
        TwoPasses(perturbation, [model])
        said = "nothing"
    except ValueError as error:
        said = str(error)
    model(x)
    optimizer = SharpnessAware(ADAM(model.parameters()), model, 0.5)
    return said, all(isinstance(w, DTensor) for w in optimizer.perturbation.parameters)


def test_whole_weights_after_a_forward_pass_alone_are_refused_or_put_back():
    for said, in_shards in results(after_a_forward_pass_alone, 2):
        assert "call reshard() on the modules before named_parameters()" in said
        assert in_shards


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_in_float32_shards_cost_no_more_digits_than_with_the_base_optimizer(processes):
    """Over all shardings together: that of a single one changes by as much with any change in rounding."""
    for on_one in results(trainings_in_float32, processes):
        of_base, of_asam = (sum(distances) for distances in zip(*on_one.values()))
        assert 0 < of_asam <= 2 * of_base, on_one


def measured(processes):
    """What measure finds with shards and on one process, for each region and kind of search."""
    regions = [Region(0.3, normalization=normalization) for normalization in NORMALIZATIONS]
    regions.append(Region(0.05, p=INF))

    def values(model, part, parts, search):
        before = {n: full(w.detach()).clone() for n, w in model.named_parameters()}

        def loss():
            for step in range(2):
                x = tokens(step).chunk(parts)[part]
                yield loss_of(model, x) * len(x), len(x)

        found = [each.value for each in measure(loss, model, regions, **search)]
        assert all(torch.equal(full(w.detach()), before[n]) for n, w in model.named_parameters())
        return found

    found = {}
    for search in ({}, {"steps": 2, "restarts": 2}):
        whole = values(network(), 0, 1, search)
        for name, (shard, shares) in SHARDINGS[processes].items():
            share = dist.get_rank() * shares // processes
            found[name, bool(search)] = np.array([values(shard(network()), share, shares, search), whole])
    return found


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharpness_is_that_of_whole_weights(processes):
    for on_one in results(measured, processes):
        for key, (sharded, whole) in on_one.items():
            np.testing.assert_allclose(sharded, whole, rtol=1e-9, err_msg=str(key))
            assert (whole > 0).all()


class Traffic(TorchDispatchMode):
    """Counts reductions of ours by their bytes: those of float64 vectors in the block's entry."""

    def __init__(self):
        super().__init__()
        self.reductions = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allreduce" in str(function) or "all_reduce" in str(function):
            tensor = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            self.reductions.append(tensor.numel() * tensor.element_size())
        return function(*args, **(kwargs or {}))


def traffic(processes):
    """The bytes of each reduction when the block is entered, for normalization operators of either kind."""
    seen = {}
    for normalization in ("element-wise", "layer-wise"):
        model = fsdp(network())
        loss_of(model, tokens(0)).backward()
        perturbation = Perturbation(model.named_parameters(), 0.1, normalization=normalization)
        with Traffic() as counted, perturbation:
            pass
        seen[normalization] = counted.reductions
    return seen


def test_an_update_sends_a_few_bytes():
    """The norm and a check with it; layer-wise also a number for each matrix."""
    for on_one in results(traffic, 2):
        assert on_one == {"element-wise": [24], "layer-wise": [8 * 5, 24]}


def half_precision(processes):
    """Sharpness of each update in bfloat16, whose masters are the shards, and in float32."""
    seen = []
    for dtype in (torch.bfloat16, torch.float32):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        model = fsdp(network().float(), mp_policy=policy)
        optimizer = SharpnessAware(ADAM(model.parameters()), model, rho=0.5)

        def closure(step, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            x = tokens(step).chunk(processes)[dist.get_rank()]
            loss = (model(x).float() - x.float().mean(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        sharpness = []
        for step in range(20):
            optimizer.step(lambda step=step: closure(step))
            sharpness.append(float(optimizer.sharpness))
        assert all(w.dtype == torch.float32 for w in model.parameters())
        seen.append(sum(sharpness) / len(sharpness))
    return seen


def test_bfloat16_with_float32_shards_as_masters():
    for in_half, in_full in results(half_precision, 2):
        assert in_half == pytest.approx(in_full, rel=0.05)


def after_an_exception(processes):
    """Whether the next forward pass is at w after the pass at w + epsilon broke off."""
    outcomes = []
    for shard in (fsdp, functools.partial(fsdp, reshard_after_forward=False)):
        model = shard(network())
        two_passes = TwoPasses(Perturbation(model.named_parameters(), 0.5), [model])
        calls = []

        def evaluate(model=model, calls=calls):
            loss = loss_of(model, tokens(0))
            calls.append(None)
            if len(calls) == 2:
                raise MemoryError
            loss.backward()
            return loss

        before = loss_of(model, tokens(0)).item()
        model.zero_grad()
        with pytest.raises(MemoryError):
            two_passes(evaluate)
        outcomes.append(loss_of(model, tokens(0)).item() == before)
    return outcomes


def test_after_an_exception_the_next_forward_pass_is_at_w():
    assert results(after_an_exception, 2) == [[True, True], [True, True]]


def bad_use(processes):
    """What is said, on each process."""
    said = {}

    def entering(case, model, perturbation):
        before = {n: full(w.detach()).clone() for n, w in model.named_parameters()}
        try:
            with perturbation:
                said[case] = "entered"
        except (ValueError, RuntimeError) as error:
            said[case] = str(error)
        if not all(torch.equal(full(w.detach()), before[n]) for n, w in model.named_parameters()):
            said[case] += " BUT WEIGHTS MOVED"

    for p in (2.0, 3.0):
        for case in ("other gradients", "no gradient", "no gradient on one"):
            model = fsdp(network())
            perturbation = Perturbation(model.named_parameters(), 0.1, p=p, normalization="layer-wise")
            loss_of(model, tokens(0)).backward()
            with perturbation:  # the processes agree in a first update
                pass
            if case == "no gradient" or (case == "no gradient on one" and dist.get_rank() == 1):
                model.zero_grad()
            elif dist.get_rank() == 1:
                model.conv.weight.grad = None
            entering((case, p), model, perturbation)
    model = fsdp(network())
    model.set_requires_gradient_sync(False)
    loss_of(model, tokens(0)).backward()
    entering("without synchronization", model, Perturbation(model.named_parameters(), 0.1))
    try:
        measure(lambda: loss_of(model, tokens(0)), model.named_parameters(), [Region(0.1)])
    except ValueError as error:
        said["measure without the module"] = str(error)
    model = fsdp(network())
    loss_of(model, tokens(0)).backward()
    perturbation = Perturbation(model.named_parameters(), 0.1)
    dist.destroy_process_group()
    try:
        with perturbation:
            pass
    except RuntimeError as error:
        said["a mesh that is gone"] = str(error)
    return said


def test_bad_use_is_told_on_every_process_and_nobody_waits():
    for rank, said in enumerate(results(bad_use, 2)):
        for p in (2.0, 3.0):
            of_one = "have gradients of different weights" if rank == 0 else "no parameter has a gradient"
            assert of_one in said["no gradient on one", p]
            assert "have gradients of different weights" in said["other gradients", p]
            assert "no parameter has a gradient" in said["no gradient", p]
        assert "set_requires_gradient_sync(False)" in said["without synchronization"]
        assert "give measure() the module itself" in said["measure without the module"]
        assert "is gone: make the update before destroy_process_group()" in said["a mesh that is gone"]
        assert not any("BUT WEIGHTS MOVED" in sentence for sentence in said.values())


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_and_told_of_fsdp2(one_process, use_orig_params):
    model = nn.Linear(4, 4)
    before = Perturbation(model.named_parameters(), rho=0.1)
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FSDP1\).*fully_shard \(FSDP2\)"):
        Perturbation(wrapped.named_parameters(), rho=0.1)
    with pytest.raises(ValueError, match="FSDP2"):
        SharpnessAware(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, rho=0.1)
    wrapped(torch.ones(2, 4)).sum().backward()
    if use_orig_params:  # the parameters are those of before, and now hold a shard
        with pytest.raises(ValueError, match="FSDP2"), before:
            pass


def test_a_graph_that_saved_shards_at_another_point_is_refused(one_process):
    model, inputs = tensor_parallel(network(), init_device_mesh("cpu", (1,))), tokens(0)
    at_w = loss_of(model, inputs)
    at_w.backward(retain_graph=True)
    sharded = [pair for pair in model.named_parameters() if isinstance(pair[1], DTensor)]
    with Perturbation(sharded, rho=0.1):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            at_w.backward(retain_graph=True)
        at_w_plus_epsilon = loss_of(model, inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        at_w_plus_epsilon.backward()


def test_one_pass_after_a_forward_pass_alone(one_process):
    """It leaves whole weights of w in the outermost module."""

    def gradient(forward_before, modules=None):
        model = fsdp(network())
        perturbation = Perturbation(model.named_parameters(), rho=0.5, direction=Random())
        two_passes = TwoPasses(perturbation, [model] if modules is None else modules)
        if forward_before:
            loss_of(model, tokens(0))

        def evaluate():
            loss = loss_of(model, tokens(0))
            loss.backward()
            return loss

        two_passes.one_pass(evaluate)
        return [full(weight.grad) for weight in model.parameters()]

    torch.testing.assert_close(gradient(forward_before=True), gradient(forward_before=False), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="give TwoPasses the model among the modules"):
        gradient(forward_before=True, modules=[])
    with pytest.raises(ValueError, match="the perturbation has weights that no module has"):
        gradient(forward_before=True, modules=[nn.MSELoss()])
