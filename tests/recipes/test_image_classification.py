"""The recipes of image classification: what they run, and what they make of it."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fairseq_asam.vision.options import TrainOptions
from recipes.image_classification.rho_search import best_rho
from tests.commands import ROOT

RECIPE = ROOT / "recipes" / "image_classification"
SCRIPTS = ("table2", "table3", "table4", "table6", "figure4", "rho_search")


@pytest.fixture
def main(monkeypatch):
    """Run a script of the recipe: ``main("table2", "--dry-run")``."""

    def run(script: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        module = importlib.import_module(f"recipes.image_classification.{script}")
        if script in ("table2", "table3"):
            data = {"table2": "cifar10", "table3": "cifar100"}[script]
            importlib.import_module("recipes.image_classification.table2").make_table(
                script, "", data, module.PAPER
            )
        else:
            module.main()

    return run


def options_of(command: str) -> TrainOptions:
    """What a command of a dry run asks for, as the training resolves it."""
    from fairseq_asam.vision.__main__ import add_options

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_options(parser)
    return TrainOptions(**vars(parser.parse_args(command.split(" train ")[1].split()))).resolved()


@pytest.fixture
def commands(main, capsys):
    """The options of every run of a script: ``commands("table2", "--embedded")``."""

    def dry_run(script: str, *arguments: str) -> list[TrainOptions]:
        with pytest.raises(SystemExit) as end:
            main(script, "--dry-run", *arguments)
        assert not end.value.code
        return [options_of(line) for line in capsys.readouterr().out.splitlines()]

    return dry_run


def test_tables_2_and_3_have_the_paper_s_hyper_parameters(commands):
    for script, dataset, rhos in (("table2", "cifar10", (0.05, 0.5)), ("table3", "cifar100", (0.1, 1.0))):
        runs = commands(script)
        assert len(runs) == 8 * 3 * 5
        assert len({run.output for run in runs}) == len(runs)
        for run in runs:
            pyramid = run.model == "pyramidnet272"
            rho = {"sgd": 0.0, "sam": rhos[0], "asam": rhos[1]}[run.optimizer]
            if pyramid and run.optimizer != "sgd":
                rho = {"sam": 0.05, "asam": 1.0}[run.optimizer]
            assert (run.dataset, run.rho, run.eta) == (dataset, rho, 0.01)
            assert run.epochs == (900 if pyramid else 200) * (2 if run.optimizer == "sgd" else 1)
            assert (run.lr, run.batch_size) == ((0.05, 256) if pyramid else (0.1, 128))
            assert run.m == (32 if pyramid and run.optimizer != "sgd" else None)
            assert (run.momentum, run.weight_decay, run.label_smoothing) == (0.9, 5e-4, 0.1)
            assert run.label_noise == 0 and run.hold_out == 0


def test_table_4_has_the_paper_s_hyper_parameters(commands):
    runs = commands("table4")
    assert len(runs) == 3 * 3
    for run in runs:
        assert (run.dataset, run.model, run.lr, run.batch_size) == ("imagenet", "resnet50", 0.2, 512)
        assert (run.weight_decay, run.label_smoothing) == (1e-4, 0.1)
        assert (run.epochs, run.m) == ((200, None) if run.optimizer == "sgd" else (100, 128))
        assert run.rho == {"sgd": 0.0, "sam": 0.05, "asam": 1.0}[run.optimizer]


def test_table_6_has_every_noise_rate_with_every_optimizer_and_seed(commands):
    runs = commands("table6")
    found = [(run.label_noise, run.optimizer, run.seed) for run in runs]
    noise = (0.0, 0.2, 0.4, 0.6, 0.8)
    assert found == [(n, o, s) for n in noise for o in ("sgd", "sam", "asam") for s in (1, 2, 3)]
    assert {(run.dataset, run.model) for run in runs} == {("cifar10", "resnet32")}
    assert [run.label_noise for run in commands("table6", "--rows", "40%", "--seeds", "1")] == [0.4] * 3


def test_figure_4_has_the_paper_s_grid_of_rho_for_each_normalization(commands):
    runs = commands("figure4", "--seeds", "1")
    variants = {(run.normalization, run.p_norm, run.normalize_bias) for run in runs}
    assert variants == {
        ("element-wise", math.inf, False),
        ("element-wise", 2.0, False),
        ("element-wise", 2.0, True),
        ("filter-wise", 2.0, False),
    }
    rhos = [run.rho for run in runs if run.p_norm == math.inf]
    digits = [0.5e-4, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0]
    assert rhos == pytest.approx(digits)
    assert {(run.model, run.optimizer) for run in runs} == {("wrn16_8", "asam")}


def test_rho_is_searched_on_held_out_images_alone(commands):
    for arguments in ((), ("--embedded",)):
        assert all(run.hold_out for run in commands("rho_search", *arguments))


def test_of_equally_accurate_rhos_the_smaller_is_best():
    """Equal as the table shows them: the means of the same counts can differ in their last digit."""
    means = {"0.02": 98.83333333333333, "0.5": 98.83333333333334, "2": 98.5, "10": None}
    summaries = {(rho, "SAM"): {"mean": mean} for rho, mean in means.items()}
    summaries["1", "ASAM"] = {"mean": 99.0}
    assert best_rho(summaries, "SAM") == "0.02"


@pytest.mark.parametrize("script", SCRIPTS)
def test_embedded_forms_need_no_data_and_have_folders_of_their_own(script, commands):
    embedded, full = commands(script, "--embedded"), commands(script)
    assert {run.dataset for run in embedded} == {"digits"}
    folders = [run.output for run in [*embedded, *full]]
    assert len(set(folders)) == len(folders)


def result(accuracies: list[float | None], dataset: str = "digits", diverged: bool = False) -> dict:
    epochs = [{"test_accuracy": a, "test_top5_accuracy": a and (1 + a) / 2} for a in accuracies]
    return {"options": {"dataset": dataset}, "epochs": epochs, "diverged": diverged}


def test_a_cell_is_the_mean_and_deviation_of_the_maxima_of_the_runs_that_did_not_fail():
    from recipes.image_classification.table import shown, summary

    good = [result([0.5, 0.8, 0.7]), result([0.9]), result([0.2, 0.82])]
    failed = [result([0.1, 0.11]), result([0.6, None], diverged=True)]
    cell = summary([*good, *failed])
    assert cell["mean"] == pytest.approx(84) and cell["std"] == pytest.approx(statistics.stdev([80, 90, 82]))
    assert (cell["runs"], cell["failed"]) == (5, 2)
    assert shown(cell) == "84.00 ± 5.29 (2 of 5 failed)"
    assert shown(summary(good, "test_top5_accuracy")) == "92.00 ± 2.65"
    assert shown(summary(good[:1])) == "80.00"
    assert shown(summary(failed)) == "all failed"
    assert shown(summary([result([0.1], "cifar100"), result([0.015], "cifar100")])) == "10.00 (1 of 2 failed)"


def test_a_picture_has_the_paper_s_means_and_leaves_out_cells_whose_runs_all_failed():
    from recipes.image_classification.table import draw
    from recipes.image_classification.table2 import PAPER

    cell = {"mean": 90.0, "std": 0.1, "runs": 5, "failed": 0}
    cells = {(row, column): cell for row in PAPER for column in ("SGD", "SAM", "ASAM")}
    cells["VGG19-BN", "SAM"] = {"mean": None, "std": None, "runs": 5, "failed": 5}
    lines = {line.get_label(): list(line.get_ydata()) for line in draw("model", cells, PAPER).axes[0].lines}
    assert lines["SAM, paper"] == [92.0, 93.56, 95.18, 94.6, 96.34, 95.74, 96.98, 98.55]
    drawn = [len(container[0].get_ydata()) for container in draw("model", cells).axes[0].containers]
    assert drawn == [8, 7, 8]


@pytest.fixture
def grid_arguments(tmp_path):
    place = {"data": None, "download": False, "dry_run": False, "launcher": sys.executable, "jobs": 2}
    return argparse.Namespace(runs=tmp_path / "runs", out=tmp_path / "out", name="trial", seeds=2, **place)


TINY = {"dataset": "digits", "model": "resnet8", "epochs": 1, "batch_size": 512}


def test_a_grid_is_trained_once_and_becomes_a_table_and_a_picture(grid_arguments, monkeypatch, capsys):
    from recipes.image_classification.grid import results_of
    from recipes.image_classification.table import publish, summary

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    grid_arguments.embedded = True
    cells = {("0%", "SGD"): {**TINY, "optimizer": "sgd"}}
    results = results_of(cells, grid_arguments)
    assert [run["options"]["seed"] for run in results["0%", "SGD"]] == [1, 2]

    files = {file: file.stat().st_mtime_ns for file in grid_arguments.runs.rglob("*")}
    assert len([file for file in files if file.name == "result.json"]) == 2
    assert results_of(cells, grid_arguments) == results
    assert files == {file: file.stat().st_mtime_ns for file in grid_arguments.runs.rglob("*")}

    summaries = {cell: summary(runs) for cell, runs in results.items()}
    publish(grid_arguments, "noise rate", summaries, results, {"0%": ("94.50 ± 0.11",)})
    assert {file.name for file in grid_arguments.out.iterdir()} == {"trial.md", "trial.json", "trial.png"}
    table = (grid_arguments.out / "trial.md").read_text()
    assert table.startswith("| noise rate | SGD | SGD, paper |\n|:--|--:|--:|\n| 0% | ")
    assert "| 94.50 ± 0.11 |" in table and "1 with sgd. 2 runs took" in table
    assert json.loads((grid_arguments.out / "trial.json").read_text())["cells"][0]["runs"] == 2

    other = {("0%", "SGD"): {**cells["0%", "SGD"], "epochs": 2}}
    with pytest.raises(SystemExit, match="was made with epochs 1, not 2: move its folder away"):
        results_of(other, grid_arguments)


def test_a_run_that_fails_ends_the_grid_with_its_reason(grid_arguments, monkeypatch, capsys):
    from recipes.image_classification.grid import results_of

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    grid_arguments.data = grid_arguments.runs / "nothing"
    cells = {("row", "SGD"): {**TINY, "dataset": "cifar10", "optimizer": "sgd"}}
    with pytest.raises(SystemExit, match=r"A run failed with status 2; all of its output is in '.*\.log'"):
        results_of(cells, grid_arguments)
    assert "has no CIFAR10" in capsys.readouterr().err


def test_a_grid_that_is_told_to_end_takes_its_runs_along(tmp_path):
    command = [sys.executable, "-m", "recipes.image_classification.table4", "--embedded", "--seeds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as grid:
        children = Path(f"/proc/{grid.pid}/task/{grid.pid}/children")
        while not (run := children.read_text().split()):
            assert grid.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
        grid.terminate()
        assert grid.wait(60) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{run[0]}").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--jobs", "0"), "--jobs is 0"), (("--rows", "ResNet-18"), "invalid choice: 'ResNet-18'")],
)
def test_what_cannot_be_is_refused(main, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main("table2", *arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_every_script_says_in_the_readme_what_it_reproduces():
    readme = Path(RECIPE / "README.md").read_text()
    assert all(f"recipes.image_classification.{script}" in readme for script in SCRIPTS)
