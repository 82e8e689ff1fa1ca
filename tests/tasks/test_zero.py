"""--zero-sharding os: each worker has the optimizer's state of a part of the weights, and steps that part."""

import signal

import pytest
import torch

from tests.commands import BACKENDS, FOR_INFERENCE_TOO, assert_same_state, checkpoint
from tests.faults import KILL, PERTURBED, Fault, train
from tests.training import on_workers, trainer_and_batches

from .test_workers import assert_close, trained, weights

pytest.importorskip("fairscale", reason="fairseq shards with fairscale")

SHARDED = ["--zero-sharding", "os", "--ddp-backend"]


@pytest.mark.parametrize(
    "backend", [BACKENDS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in BACKENDS[1:])]
)
def test_two_workers_are_one_with_the_whole_batch(corpus, backend):
    """The criterion has weights too."""
    flags = ["asam", "--criterion", "scaled_cross_entropy"]
    sharded = weights(2, corpus, *flags, *SHARDED, backend)
    assert_close(sharded, weights(1, corpus, *flags, split="whole"))


@pytest.mark.parametrize(
    "flags",
    [
        ["asam", "--ascent-scope", "micro-batch"],
        pytest.param(["asam", "--ascent-direction", "random"], marks=pytest.mark.slow),
        *(
            pytest.param([f"asam_{base}"], marks=pytest.mark.slow)
            for base in ("adadelta", "adafactor", "adagrad", "adamax", "nag", "sgd")
        ),
    ],
)
def test_the_weights_are_those_without_sharding(corpus, flags):
    """Bit for bit."""
    whole, sharded = (weights(2, corpus, *flags, *more, "legacy_ddp") for more in (SHARDED[2:], SHARDED))
    assert all((sharded[name] == w).all() for name, w in whole.items())


def trained_in_float16(cfg, rank, split):
    return trained(cfg, rank, split, torch.float32)


@pytest.mark.slow
def test_in_half_precision(corpus):
    """fairseq wants --fp16-no-flatten-grads with it."""
    flags = ["asam", "--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"]
    whole, sharded = (
        weights(2, corpus, *flags, *more, "legacy_ddp", function=trained_in_float16)
        for more in (SHARDED[2:], SHARDED)
    )
    assert all((sharded[name] == w).all() for name, w in whole.items())


def parts(cfg, rank, updates):
    """The weights whose state this worker has."""
    trainer, batches = trainer_and_batches(cfg)
    for update in range(updates):
        trainer.train_step([batches[2 * update + rank]])
    state = trainer.optimizer.optimizer.optim.state
    return [name for name, w in trainer.get_model().named_parameters() if w in state]


def test_each_worker_has_the_state_of_its_part(corpus):
    first, second = on_workers(2, parts, [corpus / "bin", "--optimizer", "asam", *SHARDED, "legacy_ddp"], 2)
    assert first and second and not set(first) & set(second)


@pytest.fixture
def run(corpus, tmp_path):
    """Run fairseq-train into a folder of the test's own, and return its last checkpoint."""

    def run_into(name, *flags, workers=2, fault=None, statuses=(0, 0)):
        sharding = SHARDED[:2] if workers == 2 else []
        flags = [*sharding, *flags, "--max-tokens", "500", "--save-interval-updates", "3"]
        ended = train(tmp_path / name, corpus / "bin", *flags, workers=workers, fault=fault)
        assert ended == list(statuses[:workers])
        return checkpoint(tmp_path / name)

    return run_into


def test_stopped_or_killed_and_resumed_is_uninterrupted(run):
    uninterrupted = run("uninterrupted", "--max-update", "15")
    run("pieces", "--max-update", "4")
    killed = Fault(KILL, PERTURBED, 6, worker=1)
    run("pieces", "--max-update", "15", fault=killed, statuses=(1, -signal.SIGKILL))
    assert_same_state(uninterrupted, run("pieces", "--max-update", "15"))


def test_a_run_goes_on_with_and_without_sharding(run):
    """The state in the checkpoint is whole; of a run with --ascent-interval it loses the components."""
    run("run", "--ascent-interval", "3", "--max-update", "3", workers=1)
    saved = run("run", "--max-update", "5")
    states = saved["last_optimizer_state"]["state"].values()
    # Two workers step weights that only inference uses too, with zeros.
    assert {state["step"] for state in states} == ({5, 2} if FOR_INFERENCE_TOO else {5})
    assert not any("ascent_component" in state for state in states)
    assert len(states) == len(saved["last_optimizer_state"]["param_groups"][0]["params"])
    assert run("run", "--max-update", "7", workers=1)["optimizer_history"][-1]["num_updates"] == 7
