"""Accumulation and several workers: the same weights however a batch is split."""

import contextlib
from argparse import Namespace
from decimal import Decimal

import fairseq.trainer
import pytest
import torch
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

from tests.commands import BACKENDS
from tests.training import merged, on_workers, trainer_and_batches

UPDATES, MICRO_BATCHES = 20, 4


def trained(cfg, rank, split, dtype=torch.float64):
    """The weights after twenty updates of four micro-batches each, split as asked: ``whole`` in one batch,
    or each worker its share."""
    trainer, batches = trainer_and_batches(cfg, dtype)
    workers = cfg.distributed_training.distributed_world_size
    share = MICRO_BATCHES // workers
    for update in range(UPDATES):
        first = update * MICRO_BATCHES
        micro_batches = [batches[(first + i) % len(batches)] for i in range(MICRO_BATCHES)]
        mine = micro_batches[rank * share : (rank + 1) * share]
        trainer.train_step([merged(trainer, micro_batches)] if split == "whole" else mine)
    assert trainer.get_num_updates() == UPDATES
    parameters = [*trainer.get_model().named_parameters(), *trainer.get_criterion().named_parameters()]
    return {name: w.detach().numpy() for name, w in parameters}


def weights(workers, corpus, *flags, split="share", function=trained):
    on_each = on_workers(workers, function, [corpus / "bin", "--optimizer", *flags], split)
    for other in on_each[1:]:  # every worker must end with the same weights
        assert all((other[name] == w).all() for name, w in on_each[0].items())
    return on_each[0]


def assert_close(actual, expected):
    for name, w in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(actual[name]),
            torch.as_tensor(w),
            rtol=1e-10,
            atol=1e-12,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize(
    "optimizer",
    [
        ["asam", "--criterion", "scaled_cross_entropy"],
        ["asam", "--ascent-direction", "momentum", "--normalization", "adam"],
        ["asam", "--ascent-direction", "random"],
        pytest.param(["asam"], marks=pytest.mark.slow),
        pytest.param(["sam", "--clip-norm", "0.05"], marks=pytest.mark.slow),
        pytest.param(["asam", "--ascent-interval", "3"], marks=pytest.mark.slow),
    ],
)
def test_scope_update_depends_on_the_batch_alone(corpus, optimizer):
    whole = weights(1, corpus, *optimizer, split="whole")
    assert ("scale" in whole) == ("scaled_cross_entropy" in optimizer)
    assert_close(weights(1, corpus, *optimizer), whole)
    for backend in BACKENDS:
        assert_close(weights(2, corpus, *optimizer, "--ddp-backend", backend), whole)


def trained_in_float32(cfg, rank, split):
    return trained(cfg, rank, split, torch.float32)


@pytest.mark.slow
def test_in_float32_a_split_costs_no_more_digits_than_with_adam(corpus):
    """The order of additions does; twice what it does to Adam is allowed, over both splits together, as that
    of a single one changes by as much with any change in rounding."""
    distance = {}
    for optimizer in ("adam", "asam"):
        whole = weights(1, corpus, optimizer, split="whole", function=trained_in_float32)
        accumulated = weights(1, corpus, optimizer, function=trained_in_float32)
        workers = weights(2, corpus, optimizer, "--ddp-backend", "legacy_ddp", function=trained_in_float32)
        distance[optimizer] = [
            sum(((split[name] - w) ** 2).sum() for name, w in whole.items()) ** 0.5
            for split in (accumulated, workers)
        ]
    assert min(distance["asam"]) > 0
    assert sum(distance["asam"]) <= 2 * sum(distance["adam"]), distance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interval", [pytest.param("1", marks=pytest.mark.slow), "3"])
def test_scope_micro_batch_depends_on_the_micro_batches_alone(corpus, backend, interval):
    """Whichever worker has them; one worker is held against a computation by hand in test_train_step."""
    flags = ["asam", "--ascent-interval", interval]
    update = weights(1, corpus, *flags)
    flags += ["--ascent-scope", "micro-batch"]
    one = weights(1, corpus, *flags)
    assert_close(weights(2, corpus, *flags, "--ddp-backend", backend), one)
    assert any(abs(update[name] - w).max() > 1e-6 for name, w in one.items())


@pytest.mark.parametrize("scope", [pytest.param("update", marks=pytest.mark.slow), "micro-batch"])
def test_with_a_fraction_the_workers_stay_the_same(corpus, scope):
    flags = ["asam", "--ascent-scope", scope, "--ascent-fraction", "0.5"]
    two = weights(2, corpus, *flags, "--ddp-backend", "legacy_ddp")
    whole = weights(2, corpus, *flags[:-2], "--ddp-backend", "legacy_ddp")
    assert any(abs(two[name] - w).max() > 1e-6 for name, w in whole.items())


#: The numbers of the batches of each worker in each update. The second worker runs out of them.
UNEVEN = [([0], [1]), ([2, 3], [4, None]), ([5], [None]), ([6], [None]), ([7, 8], [None, None])]


def trained_until_one_runs_out(cfg, rank, _):
    trainer, batches = trainer_and_batches(cfg)
    for numbers in UNEVEN:
        if cfg.distributed_training.distributed_world_size == 1:
            mine = [number for number in (*numbers[0], *numbers[1]) if number is not None]
        else:
            mine = numbers[rank]
        trainer.train_step([{} if number is None else batches[number] for number in mine])
    return {name: w.detach().numpy() for name, w in trainer.get_model().named_parameters()}


@pytest.mark.parametrize("scope", ["update", pytest.param("micro-batch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_worker_without_data_neither_hangs_nor_disturbs(corpus, scope, backend):
    flags = ["asam", "--ascent-scope", scope]
    one = weights(1, corpus, *flags, function=trained_until_one_runs_out)
    two = weights(2, corpus, *flags, "--ddp-backend", backend, function=trained_until_one_runs_out)
    assert_close(two, one)


def received(cfg, rank, sent):
    return distributed_utils.broadcast_object(
        sent if rank == 0 else None, src_rank=0, group=distributed_utils.get_global_group()
    )


def test_workers_receive_the_configuration_of_a_checkpoint(corpus):
    """The first worker loads it. torch 2.6 and newer load only what they are told is safe."""
    sent = {"args": Namespace(lr=[0.1]), "cfg": OmegaConf.create({"a": {"b": 1}}), "lr": Decimal("0.1")}
    flags = [corpus / "bin", "--optimizer", "asam", "--ddp-backend", "legacy_ddp"]
    assert on_workers(2, received, flags, sent) == [sent, sent]


def trained_out_of_memory(cfg, rank, failing):
    """The pass *failing* = (worker, call of the criterion) ends out of memory, for once.

    A third number is that of the micro-batches of an update, 2 without it.
    """
    *failing, micro_batches = failing if len(failing) == 3 else (*failing, 2)
    trainer, batches = trainer_and_batches(cfg)
    criterion, calls = trainer.get_criterion(), []
    forward = criterion.forward

    def out_of_memory(*args, **kwargs):
        calls.append(None)
        if failing == [rank, len(calls)]:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    criterion.forward = out_of_memory
    workers = cfg.distributed_training.distributed_world_size
    for update in range(4):
        first = (update * workers + rank) * micro_batches
        trainer.train_step(batches[first : first + micro_batches])
    return {name: w.detach().numpy() for name, w in trainer.get_model().named_parameters()}


def trained_on_some(cfg, rank, updates):
    """Each of *updates* is on the pairs of batches with these numbers; one without any is left out."""
    trainer, batches = trainer_and_batches(cfg)
    for update in updates:
        mine = [batch for number in update for batch in batches[2 * number : 2 * number + 2]]
        if mine:
            trainer.train_step(mine)
    return {name: w.detach().numpy() for name, w in trainer.get_model().named_parameters()}


@pytest.mark.parametrize(
    "scope, call",
    [
        ("update", 8),
        ("micro-batch", 9),
        pytest.param("update", 2, marks=pytest.mark.slow),
        pytest.param("micro-batch", 3, marks=pytest.mark.slow),
    ],
)
def test_out_of_memory_in_one_worker_at_an_ascent(corpus, scope, call):
    """In the last pass at w, with which the worker finds what later updates reuse: of the first update, and
    of the third, when there is a component of an earlier one."""
    flags = ["asam", "--ascent-scope", scope, "--ascent-interval", "2", "--ddp-backend", "legacy_ddp"]
    weights(2, corpus, *flags, split=(1, call), function=trained_out_of_memory)


@pytest.mark.parametrize(
    "scope, call",
    [
        *(("update", call) for call in (6, 7)),
        *(pytest.param("update", call, marks=pytest.mark.slow) for call in (5, 8)),
        *(pytest.param("micro-batch", call, marks=pytest.mark.slow) for call in (5, 6, 7, 8)),
    ],
)
def test_out_of_memory_in_one_worker(corpus, scope, call):
    """In the second update of two micro-batches each: a pass at w or at w + epsilon, the first or the last
    of the update. As without this plugin, legacy_ddp goes on with the gradients of the other worker."""
    flags = ["asam", "--ascent-scope", scope, "--ddp-backend", "legacy_ddp"]
    two = weights(2, corpus, *flags, split=(1, call), function=trained_out_of_memory)
    one = weights(1, corpus, *flags, split=(0, call), function=trained_out_of_memory)
    assert_close(one, weights(1, corpus, *flags, split=[[0], [], [2], [3]], function=trained_on_some))
    if scope == "update" and call in (5, 6):  # at w, so that epsilon is that of the other worker too
        left = [[0, 1], [2], [4, 5], [6, 7]]
        assert_close(two, weights(1, corpus, *flags, split=left, function=trained_on_some))


@pytest.mark.parametrize("scope", ["update", pytest.param("micro-batch", marks=pytest.mark.slow)])
def test_out_of_memory_before_more_than_one_micro_batch(corpus, scope):
    """In the first pass of the second update. fairseq clears the gradients of the others one by one."""
    flags = ["asam", "--ascent-scope", scope, "--ddp-backend", "legacy_ddp"]
    weights(2, corpus, *flags, split=(1, 9, 4), function=trained_out_of_memory)


def trained_on_a_nan(cfg, rank, _):
    """One worker's loss at w is NaN, once: whether the run ended, and how many updates there were."""
    trainer, batches = trainer_and_batches(cfg)
    criterion, calls = trainer.get_criterion(), []
    forward = criterion.forward

    def nan_once(*args, **kwargs):
        calls.append(None)
        loss, sample_size, logging_output = forward(*args, **kwargs)
        return loss * (float("nan") if (rank, len(calls)) == (1, 1) else 1.0), sample_size, logging_output

    criterion.forward = nan_once
    # What fairseq runs to find the layer of the NaN fails with newer torch, whatever the optimizer.
    fairseq.trainer.NanDetector = contextlib.nullcontext
    try:
        trainer.train_step([batches[rank]])
    except FloatingPointError:
        return "ended", trainer.get_num_updates()


@pytest.mark.parametrize("scope", ["update", pytest.param("micro-batch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_at_w_that_is_not_finite_counts_on_every_worker(corpus, tmp_path, scope, backend):
    """Although the pass at w + epsilon, with other masks, might be finite."""
    flags = ["--optimizer", "asam", "--ascent-scope", scope, "--fresh-masks", "--ddp-backend", backend]
    arguments = [corpus / "bin", *flags, "--save-dir", tmp_path]
    assert on_workers(2, trained_on_a_nan, arguments, None) == [("ended", 0), ("ended", 0)]
