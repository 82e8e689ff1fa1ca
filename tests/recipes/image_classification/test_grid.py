from __future__ import annotations

import argparse
import json
import sys

import pytest

from recipes.image_classification.grid import results_of
from recipes.image_classification.table import publish, summary
from tests.commands import ROOT

SCRIPTS = ("tables 2", "tables 3", "tables 4", "tables 6", "figure4", "rho_search")


@pytest.mark.parametrize("script", SCRIPTS)
def test_with_digits_a_script_needs_no_data_and_has_folders_of_its_own(script, commands):
    small, full = commands(*script.split(), "--digits"), commands(*script.split())
    assert {run.dataset for run in small} == {"digits"}
    folders = [run.output for run in [*small, *full]]
    assert len(set(folders)) == len(folders)


def test_the_place_of_the_data_goes_to_every_run(commands):
    for run in commands("tables", "6", "--data", "data", "--download"):
        assert str(run.data) == "data" and run.download


@pytest.fixture
def grid_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = {"data": None, "download": False, "dry_run": False, "launcher": sys.executable, "jobs": 2}
    folders = {"runs": tmp_path / "runs", "out": tmp_path / "out"}
    return argparse.Namespace(**folders, **place, name="trial", seeds=2, digits=True)


TINY = {"dataset": "digits", "model": "resnet8", "epochs": 1, "batch_size": 512}
CELLS = {("0%", "SGD"): {**TINY, "optimizer": "sgd"}}


def test_a_grid_is_trained_once_and_becomes_a_table_and_a_picture(grid_arguments):
    results = results_of(CELLS, grid_arguments)
    assert [run["options"]["seed"] for run in results["0%", "SGD"]] == [1, 2]

    files = {file: file.stat().st_mtime_ns for file in grid_arguments.runs.rglob("*")}
    assert len([file for file in files if file.name == "result.json"]) == 2
    # where the data are and what starts a run do not decide its result
    elsewhere = {**vars(grid_arguments), "data": grid_arguments.out, "launcher": "no-such-launcher"}
    assert results_of(CELLS, argparse.Namespace(**elsewhere)) == results
    assert files == {file: file.stat().st_mtime_ns for file in grid_arguments.runs.rglob("*")}

    summaries = {cell: summary(runs) for cell, runs in results.items()}
    publish(grid_arguments, "noise rate", summaries, results, {"0%": ("94.50 ± 0.11",)})
    assert {file.name for file in grid_arguments.out.iterdir()} == {"trial.md", "trial.json", "trial.png"}
    table = (grid_arguments.out / "trial.md").read_text()
    assert table.startswith("| noise rate | SGD | SGD, paper |\n|:--|--:|--:|\n| 0% | ")
    assert "| 94.50 ± 0.11 |" in table and "1 with sgd. 2 runs took" in table
    assert json.loads((grid_arguments.out / "trial.json").read_text())["cells"][0]["runs"] == 2

    other = {("0%", "SGD"): {**CELLS["0%", "SGD"], "epochs": 2}}
    with pytest.raises(SystemExit, match="holds a run with epochs 1, not 2: move it away"):
        results_of(other, grid_arguments)


def test_a_run_that_was_made_before_is_not_made_again(grid_arguments):
    """By `python -m fairseq_asam.vision train` or by an older form of the recipe: it has no run.json."""
    grid_arguments.seeds = 1
    results = results_of(CELLS, grid_arguments)
    [file] = grid_arguments.runs.rglob("run.json")
    file.unlink()
    made = (file.parent / "result.json").stat().st_mtime_ns
    assert results_of(CELLS, grid_arguments) == results
    assert (file.parent / "result.json").stat().st_mtime_ns == made


def test_a_run_that_fails_ends_the_grid_with_its_reason(grid_arguments, capfd):
    grid_arguments.data = grid_arguments.runs / "nothing"
    with pytest.raises(SystemExit) as end:
        results_of({("row", "SGD"): {**TINY, "dataset": "cifar10", "optimizer": "sgd"}}, grid_arguments)
    assert end.value.code == 2
    assert "has no CIFAR10" in capfd.readouterr().err


def test_fewer_seeds_than_one_are_refused(main, capsys):
    with pytest.raises(SystemExit) as end:
        main("tables", "2", "--seeds", "0")
    assert end.value.code == 2 and "--seeds: must be a whole number from 1, not 0" in capsys.readouterr().err


def test_the_readme_says_of_every_script_what_it_makes():
    readme = (ROOT / "recipes" / "image_classification" / "README.md").read_text()
    assert all(f"recipes.image_classification.{script}" in readme for script in SCRIPTS)
