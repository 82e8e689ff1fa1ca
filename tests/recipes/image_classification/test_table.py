from __future__ import annotations

import statistics

import pytest

from recipes.image_classification.table import draw, summary, text_of
from recipes.image_classification.tables import TABLES


def result(accuracies: list[float | None], dataset: str = "digits", diverged: bool = False) -> dict:
    epochs = [{"test_accuracy": a, "test_top5_accuracy": a and (1 + a) / 2} for a in accuracies]
    return {"options": {"dataset": dataset}, "epochs": epochs, "diverged": diverged}


def test_a_cell_is_the_mean_and_deviation_of_the_maxima_of_the_runs_that_did_not_fail():
    good = [result([0.5, 0.8, 0.7]), result([0.9]), result([0.2, 0.82])]
    failed = [result([0.1, 0.11]), result([0.6, None], diverged=True)]
    cell = summary([*good, *failed])
    assert cell["mean"] == pytest.approx(84) and cell["std"] == pytest.approx(statistics.stdev([80, 90, 82]))
    assert (cell["runs"], cell["failed"]) == (5, 2)
    assert text_of(cell) == "84.00 ± 5.29 (2 of 5 failed)"
    assert text_of(summary(good, "test_top5_accuracy")) == "92.00 ± 2.65"
    assert text_of(summary(good[:1])) == "80.00"
    assert text_of(summary(failed)) == "all failed"
    chance = [result([0.1], "cifar100"), result([0.015], "cifar100")]
    assert text_of(summary(chance)) == "10.00 (1 of 2 failed)"
    assert text_of(None) == ""


def test_a_picture_has_the_paper_s_means_and_leaves_out_cells_whose_runs_all_failed():
    cell = {"mean": 90.0, "std": 0.1, "runs": 5, "failed": 0}
    paper = TABLES["2"].paper
    cells = {(row, column): cell for row in paper for column in ("SGD", "SAM", "ASAM")}
    cells["VGG19-BN", "SAM"] = {"mean": None, "std": None, "runs": 5, "failed": 5}
    lines = {line.get_label(): list(line.get_ydata()) for line in draw("model", cells, paper).axes[0].lines}
    assert lines["SAM, paper"] == [92.0, 93.56, 95.18, 94.6, 96.34, 95.74, 96.98, 98.55]
    drawn = [len(container[0].get_ydata()) for container in draw("model", cells).axes[0].containers]
    assert drawn == [8, 7, 8]
