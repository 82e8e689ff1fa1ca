"""What crashes leave behind: checkpoints of unperturbed weights, from which a run goes on as if nothing had
happened."""

import json
import signal
from collections import Counter, defaultdict

import pytest

from recipes.faults.faults import Training
from recipes.faults.injection import Fault, Kind, Place
from tests.commands import assert_same_state, checkpoint, run_module

SCRIPT = "recipes.faults.faults"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_w_plus_epsilon_and_resumed_is_uninterrupted(corpus, tmp_path, workers):
    """With two workers the second is killed, and the first must end by itself."""
    epochs = ["--max-epoch", "3"]
    uninterrupted = Training(tmp_path / "uninterrupted", corpus / "bin", *epochs, workers=workers)
    assert uninterrupted.run().statuses == [0] * workers
    killed = Training(tmp_path / "killed", corpus / "bin", *epochs, workers=workers)
    fault = Fault(Kind.KILL, Place.PERTURBED, visit=33 // workers, workers=(workers - 1,))
    end = killed.run(fault)
    assert (end.statuses, end.place) == ([1, -signal.SIGKILL][-workers:], Place.PERTURBED)
    before = checkpoint(killed.folder)["optimizer_history"][-1]["num_updates"]
    assert killed.run().statuses == [0] * workers
    states = [checkpoint(training.folder) for training in (uninterrupted, killed)]
    assert_same_state(*states)
    assert 0 < before < states[1]["optimizer_history"][-1]["num_updates"]


@pytest.mark.slow
@pytest.mark.parametrize("workers, kills, name", [(1, 5, "faults"), (2, 3, "faults-2-workers")])
def test_the_script_tables_every_fault(tmp_path, workers, kills, name):
    process = run_module(SCRIPT, "--kills", kills, "--workers", workers, "--out", tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["workers"] == workers
    assert process.stdout.endswith((tmp_path / f"{name}.md").read_text())
    places, hit, tried = defaultdict(set), defaultdict(set), Counter()
    for row in results["rows"]:
        assert row["tried"] == row["survived"] > 0
        workers_hit = " and ".join(map(str, row["workers"]))
        cells = (row["fault"], workers_hit, row["place"], row["tried"], row["survived"])
        assert f"| {' | '.join(map(str, cells))} |" in process.stdout
        places[row["fault"]].add(row["place"])
        hit[row["fault"]].add(workers_hit)
        tried[row["fault"]] += row["tried"]
    passes = {"pass at w", "pass at w + epsilon"}
    files = {"writing a checkpoint", "copying a checkpoint"}
    assert places["SIGTERM"] >= passes | files
    for fault in ("exception in the criterion", "out of memory", "NaN loss"):
        assert places[fault] == passes
        assert hit[fault] == {str(worker) for worker in range(workers)}
    assert places["full disk"] == files
    if workers == 1:
        assert places["kill -9"] >= passes | files
        assert tried["kill -9"] == kills
    else:
        assert hit["kill -9"] == hit["SIGTERM"] == {"0", "1", "0 and 1"}
        dummies = {f"{place}, worker 1 without a batch" for place in passes}
        assert places["other dummy batch"] == dummies and places["kill -9"] > dummies
        assert tried["kill -9"] == kills + 6  # each of the three that may be hit, with each dummy batch


def test_bad_arguments_get_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    for flags, sentence in (
        (["--kills", "-1"], "--kills is -1, but"),
        (["--workers", "3"], "--workers is 3, but"),
        (["--out", tmp_path / "file"], f"--out '{tmp_path / 'file'}' is a file"),
    ):
        process = run_module(SCRIPT, *flags)
        assert process.returncode == 2 and process.stderr.startswith(f"faults.py: {sentence}")
        assert len(process.stderr.splitlines()) == 1
