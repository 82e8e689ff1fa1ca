"""What crashes leave behind: checkpoints of unperturbed weights, from which a run goes on as if nothing had
happened."""

import json
import signal
import subprocess
import sys

import pytest
from commands import ROOT, assert_same_state, checkpoint

SCRIPT = ROOT / "recipes" / "faults" / "faults.py"
sys.path.insert(0, str(SCRIPT.parent))
from faults import Training  # noqa: E402
from injection import Fault, Kind, Place  # noqa: E402


def test_killed_at_w_plus_epsilon_and_resumed_is_uninterrupted(corpus, tmp_path):
    epochs = ["--max-epoch", "2"]
    uninterrupted = Training(tmp_path / "uninterrupted", corpus / "bin", *epochs)
    assert uninterrupted.run().status == 0
    killed = Training(tmp_path / "killed", corpus / "bin", *epochs)
    end = killed.run(Fault(Kind.KILL, Place.PERTURBED, visit=60))
    assert (end.status, end.place) == (-signal.SIGKILL, Place.PERTURBED)
    before = checkpoint(killed.folder)["optimizer_history"][-1]["num_updates"]
    assert killed.run().status == 0
    states = [checkpoint(training.folder) for training in (uninterrupted, killed)]
    assert_same_state(*states)
    assert 0 < before < states[1]["optimizer_history"][-1]["num_updates"]


@pytest.mark.slow
def test_the_script_tables_every_fault(tmp_path):
    command = [sys.executable, SCRIPT, "--kills", "5", "--out", tmp_path]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads((tmp_path / "faults.json").read_text())
    places = {row["fault"]: set() for row in results["rows"]}
    for row in results["rows"]:
        assert row["tried"] == row["survived"] > 0
        assert f"| {row['fault']} | {row['place']} | {row['tried']} | {row['survived']} |" in process.stdout
        places[row["fault"]].add(row["place"])
    passes = {"pass at w", "pass at w + epsilon"}
    files = {"writing a checkpoint", "copying a checkpoint"}
    assert places["kill -9"] >= passes | files and places["SIGTERM"] >= passes | files
    for fault in ("exception in the criterion", "out of memory", "NaN loss"):
        assert places[fault] == passes
    assert places["full disk"] == files
    assert sum(row["tried"] for row in results["rows"] if row["fault"] == "kill -9") == 5


def test_bad_arguments_get_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    for flags, sentence in (
        (["--kills", "-1"], "--kills is -1, but"),
        (["--out", tmp_path / "file"], f"--out '{tmp_path / 'file'}' is a file"),
    ):
        command = [sys.executable, SCRIPT, *flags]
        process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert process.returncode == 2 and process.stderr.startswith(f"faults.py: {sentence}")
        assert len(process.stderr.splitlines()) == 1
