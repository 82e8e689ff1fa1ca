"""What crashes leave behind: checkpoints of unperturbed weights, from which a run goes on as if nothing had
happened, bit for bit."""

from __future__ import annotations

import signal

import pytest

from tests.commands import assert_same_state, checkpoint
from tests.faults import (
    AT_W,
    COPYING,
    EXCEPTION,
    FULL_DISK,
    KILL,
    NAN,
    OUT_OF_MEMORY,
    PERTURBED,
    SKIP,
    UPDATE,
    WRITING,
    Fault,
    train,
)

#: The interval is shorter than an epoch, and no divisor of one.
FLAGS = ["--max-epoch", "2", "--max-tokens", "500", "--update-freq", "2", "--disable-validation"]
FLAGS += ["--save-interval-updates"]


def updates_in(saved: dict) -> int:
    return saved["optimizer_history"][-1]["num_updates"]


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> dict[int, dict]:
    """The state of a run after each update."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(folder, corpus / "bin", *FLAGS, "1") == [0]
    states = [checkpoint(folder, file.name) for file in folder.glob("*.pt")]
    return {updates_in(saved): saved for saved in states}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "fault",
    [
        Fault(KILL, PERTURBED, 15),
        Fault(EXCEPTION, PERTURBED, 15),
        pytest.param(Fault(KILL, AT_W, 14), marks=slow),
        pytest.param(Fault(KILL, WRITING, 3), marks=slow),
        pytest.param(Fault(KILL, COPYING, 3), marks=slow),
        pytest.param(Fault(EXCEPTION, AT_W, 14), marks=slow),
        pytest.param(Fault(NAN, AT_W, 14), marks=slow),
        pytest.param(Fault(NAN, PERTURBED, 15), marks=slow),
        pytest.param(Fault(FULL_DISK, WRITING, 3), marks=slow),
        pytest.param(Fault(FULL_DISK, COPYING, 3), marks=slow),
    ],
    ids=lambda fault: f"{fault.what} {fault.place}",
)
def test_a_run_that_a_fault_ends_goes_on_from_the_weights_at_w(corpus, tmp_path, uninterrupted, fault):
    """With crash.pt, which fairseq writes in the middle of an update."""
    folder = tmp_path / "run"
    status = -signal.SIGKILL if fault.what == KILL else 1
    assert train(folder, corpus / "bin", *FLAGS, "3", fault=fault) == [status]
    left = sorted(folder.glob("*.pt"))
    assert (folder / "crash.pt" in left) == (fault.what in (EXCEPTION, NAN))
    for saved in (checkpoint(folder, file.name) for file in left):
        assert_same_state(saved, uninterrupted[updates_in(saved)])
    assert 0 < updates_in(checkpoint(folder)) < max(uninterrupted)
    assert train(folder, corpus / "bin", *FLAGS, "3") == [0]
    assert_same_state(checkpoint(folder), uninterrupted[max(uninterrupted)])


@pytest.mark.parametrize("place", [pytest.param(AT_W, marks=slow), pytest.param(PERTURBED, marks=slow)])
def test_an_update_that_runs_out_of_memory_is_left_out(corpus, tmp_path, place):
    """In the second of its two micro-batches."""
    for name, fault in (("skip", Fault(SKIP, UPDATE, 5)), ("memory", Fault(OUT_OF_MEMORY, place, 10))):
        assert train(tmp_path / name, corpus / "bin", *FLAGS, "3", fault=fault) == [0]
    assert_same_state(*(checkpoint(tmp_path / name) for name in ("skip", "memory")))


@pytest.mark.slow
def test_of_two_workers_the_one_that_is_left_alone_ends(corpus, tmp_path):
    flags = [*FLAGS, "3"]
    assert train(tmp_path / "whole", corpus / "bin", *flags, workers=2) == [0, 0]
    killed = Fault(KILL, PERTURBED, 9, worker=1)
    assert train(tmp_path / "run", corpus / "bin", *flags, workers=2, fault=killed) == [1, -signal.SIGKILL]
    assert updates_in(checkpoint(tmp_path / "run")) == 3
    assert train(tmp_path / "run", corpus / "bin", *flags, workers=2) == [0, 0]
    assert_same_state(*(checkpoint(tmp_path / name) for name in ("whole", "run")))
