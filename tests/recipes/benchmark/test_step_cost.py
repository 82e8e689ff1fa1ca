from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import FOR_INFERENCE_TOO
from tests.recipes.benchmark.scripts import assert_refused, output_of, rows_of


@pytest.mark.slow
def test_step_cost_has_the_time_and_the_memory_of_every_optimizer(tmp_path: Path):
    optimizers = ["adam", "asam --ascent-interval 2", "sam --ascent-fraction 0.25"]
    text = output_of(
        *("step_cost", "--models", "small", "--max-tokens", "100", "--rounds", "2"),
        *("--optimizers", *optimizers, "--out", tmp_path / "out.json"),
    )
    (model,) = json.loads((tmp_path / "out.json").read_text())["models"]
    weights = 1487232 if FOR_INFERENCE_TOO else 1355264
    assert model["weights"] == weights and 50 < model["target_tokens"] <= 100
    assert [row[0] for row in rows_of(text)] == 2 * optimizers
    adam, *others = model["seconds"]
    assert (adam["optimizer"], adam["ratio"], adam["passes"]) == ("adam", 1, 1)
    assert [row["passes"] for row in others] == [1.5, 1.25]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in others)
    adam, *others = model["memory"]
    assert (adam["optimizer"], adam["copies"]) == ("adam", 0)
    for row in others:
        assert 0.5 < row["copies"] < 4
        assert row["copies"] == pytest.approx(
            (row["peak_bytes"] - adam["peak_bytes"]) / (4 * model["weights"])
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds: must be a whole number from 1, not 0"),
        (["--threads", "0"], "--threads: must be a whole number from 1, not 0"),
        (["--max-tokens", "20"], "--max-tokens must be at least 100, .* not 20"),
        (["--models", "resnet"], "invalid choice: 'resnet'"),
        (["--optimizers", "adam", "asam --roh 1"], "'--optimizer asam --roh 1': .*--roh"),
        (["--optimizers", "adam", "lion"], "'--optimizer lion': .*invalid choice: 'lion'"),
    ],
)
def test_bad_input_is_named_in_a_sentence(arguments, message, monkeypatch, capfd):
    assert_refused("step_cost", arguments, message, monkeypatch, capfd)
