"""The grid of models end to end, on digits."""

from __future__ import annotations

import json
import sys

import pytest

from recipes.paper import rank_models
from tests.commands import ROOT

QUICK = ["--weight-decay", "1e-4", "--steps", "3", "--stop-loss", "0.1", "--epochs", "6"]
GRID = ["--batch-size", "32", "--lr", "0.03", "0.1", "--dropout", "0", "0.2"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command with an output folder of its own; return what it printed."""

    def run(*arguments):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setattr(sys, "argv", ["rank_models", str(tmp_path / "out"), *QUICK, *arguments])
        rank_models.main()
        return capsys.readouterr().out

    return run


def without_times(path):
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}


def test_a_grid_from_training_to_table_and_on_after_an_interruption(tmp_path, command):
    out = command(*GRID, "--jobs", "2")
    assert "4 of 4 models reached a training loss of 0.1 within 6 epochs" in out
    assert (tmp_path / "out" / "rank.md").read_text("utf-8") == out
    # the paper's Table 1 stands beside
    tau = next(line for line in out.splitlines() if line.startswith("| τ"))
    assert tau.endswith("| 0.174 | 0.636 | 0.257 | 0.616 |") and tau.count("|") == 10
    assert (tmp_path / "out" / "rank.png").read_bytes().startswith(b"\x89PNG")
    models = json.loads((tmp_path / "out" / "models.json").read_text())
    found = [tuple(model["hyper_parameters"].values()) for model in models]
    assert found == [(32, lr, 1e-4, dropout) for lr in (0.03, 0.1) for dropout in (0.0, 0.2)]
    for model in models:
        assert model["train_loss"] <= 0.1 < 2 * model["train_loss"]
        assert model["generalization_gap"] == model["test_loss"] - model["train_loss"]
        assert len(model["measures"]) == 4 and all(value > 0 for value in model["measures"].values())
    files = sorted((tmp_path / "out" / "models").glob("*/*-dropout-*.json"))
    assert len(files) == 4

    # a run was stopped before its last model: it alone is made again, with the same numbers
    before = without_times(files[2])
    files[2].unlink()
    run = files[2].parent / "run.json"
    run.write_text(run.read_text().replace("true", "false"))
    others = {path: path.stat().st_mtime_ns for path in files if path != files[2]}
    again = command(*GRID, "--jobs", "1")
    assert again.splitlines()[:-1] == out.splitlines()[:-1]  # the last line has the time
    assert without_times(files[2]) == before
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())


def test_the_numbers_are_those_in_the_results(tmp_path, command):
    """Up to what another processor rounds differently."""
    results = json.loads((ROOT / "recipes" / "results" / "paper" / "rank" / "models.json").read_text())
    paper = ("--stop-loss", "0.01", "--epochs", "60", "--steps", "20", "--lr", "0.1", "--dropout", "0")
    command("--batch-size", "64", *paper, "--weight-decay", "1e-4", "1e-3")
    for model in json.loads((tmp_path / "out" / "models.json").read_text()):
        [before] = [each for each in results if each["hyper_parameters"] == model["hyper_parameters"]]
        assert model.keys() == before.keys() and model["settings"] == before["settings"]
        assert model["epochs"] == pytest.approx(before["epochs"], abs=1)
        assert model["generalization_gap"] == pytest.approx(before["generalization_gap"], rel=0.1)


@pytest.mark.slow
def test_a_model_that_misses_the_criterion_is_counted_and_left_out(tmp_path, command):
    grid = ["--batch-size", "32", "--lr", "1e-5", "0.05", "0.1", "--dropout", "0"]
    out = command(*grid)
    assert "2 of 3 models reached a training loss of 0.1" in out
    assert len(json.loads((tmp_path / "out" / "models.json").read_text())) == 2
    [file] = (tmp_path / "out" / "models" / "batch_size-32-lr-1e-05").glob("*-dropout-0.json")
    failed = json.loads(file.read_text())
    assert failed["reached"] is False and failed["epochs"] == 6 and "measures" not in failed
    # a setting that differs would mix two experiments
    with pytest.raises(SystemExit, match=r"holds a run with epochs 6, not 7: move it away\.$"):
        command(*grid, "--epochs", "7")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dropout", "1"], r"--dropout has the value 1.0, but it must be at least 0 and below 1"),
        (["--batch-size", "0"], r"--batch-size has the value 0, but it must be at least 2"),
        (["--batch-size", "5000"], r"--batch-size is 5000, but there are 1197 images"),
        (["--lr", "nan"], r"--lr has the value nan"),
        (["--epochs", "0"], r"--epochs is 0, but it must be at least 1"),
        (["--stop-loss", "0"], r"--stop-loss is 0.0, but it is a loss to reach"),
        (["--rho", "-1"], r"rho is -1"),
        (["--jobs", "0"], r"--jobs is 0, but it must be at least 1"),
        (["--dataset", "cifar10"], r"CIFAR10 needs a folder: name one with --data"),
        (["--dataset", "cifar10", "--data", "nowhere"], r"'nowhere' has no CIFAR10"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, message, tmp_path, command):
    with pytest.raises(SystemExit, match=message):
        command(*arguments)
    assert not (tmp_path / "out").exists()


def test_too_few_models_to_rank(tmp_path, command):
    with pytest.raises(SystemExit, match="0 of 1 models reached the training loss 1e-09, too few to rank"):
        grid = ["--batch-size", "32", "--lr", "0.1", "--dropout", "0"]
        command(*grid, "--epochs", "1", "--stop-loss", "1e-9")
    assert not (tmp_path / "out" / "models.json").exists()
