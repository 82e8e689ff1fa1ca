from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from recipes.benchmark import step_cost
from recipes.benchmark.trainers import MODELS, configuration
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
    adam, *others = model["memory"]
    assert (adam["optimizer"], adam["copies"]) == ("adam", 0)
    # weights, gradients and Adam's two moments, beside the libraries
    assert 16 * weights < adam["peak_bytes"] < 4e9
    assert all(0.5 < row["copies"] < 4 for row in others)


def test_the_ratio_is_to_the_first_optimizer_in_the_same_round(monkeypatch):
    """On a machine that is slow at first, gets slower, and holds sam up in one round."""
    pace = {"adam": iter([9, 9, 1, 1, 3, 3, 2, 2]), "sam": iter([8, 8, 1, 1, 3, 3, 2, 38])}
    alone = {"adam": 0.1, "sam": 0.19}
    monkeypatch.setattr(step_cost, "trainer_and_batches", lambda cfg: (cfg.optimizer._name, [None]))
    monkeypatch.setattr(step_cost, "update_seconds", lambda name, batch: alone[name] * next(pace[name]))
    cfgs = {
        flags: configuration(argparse.ArgumentParser(), Path("data"), MODELS["small"], flags, 100, "cpu")
        for flags in ("adam", "sam --ascent-fraction 0.5")
    }
    adam, sam = step_cost.seconds(cfgs, group=2, rounds=3, name="small")
    assert adam == {"optimizer": "adam", "seconds": pytest.approx(0.2), "ratio": 1.0, "passes": 1.0}
    assert sam == {
        "optimizer": "sam --ascent-fraction 0.5",
        "seconds": pytest.approx(0.57),
        "ratio": pytest.approx(1.9),
        "passes": 1.5,
    }


def test_memory_is_counted_in_float32_copies_of_the_weights():
    rows = step_cost.in_copies(peak=1_600_000_000, base=1_200_000_000, weights=50_000_000)
    assert rows == {"copies": 2.0, "share": pytest.approx(8 / 7)}


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
