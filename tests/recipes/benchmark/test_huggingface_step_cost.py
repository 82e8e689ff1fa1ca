from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest

from tests.recipes.benchmark.scripts import assert_refused, rows_of

pytest.importorskip("transformers")
from transformers import T5ForConditionalGeneration

from recipes.benchmark import huggingface_step_cost

TINY = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 20}


def test_each_trainer_makes_its_passes_and_has_a_ratio_to_the_stock_one(tmp_path: Path, monkeypatch, capsys):
    out, passes, forward = tmp_path / "out.json", [], T5ForConditionalGeneration.forward

    @functools.wraps(forward)
    def counted(model, *arguments, **options):
        passes.append(id(model))
        return forward(model, *arguments, **options)

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", counted)
    monkeypatch.setattr(huggingface_step_cost, "SIZES", TINY)
    options = ["--batch-size", "2", "--length", "3", "--rounds", "2", "--updates", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["huggingface_step_cost.py", *options])
    huggingface_step_cost.main()
    # 3 rounds of 2 updates for each of five models
    assert sorted(map(passes.count, set(passes))) == [6, 6, 6, 12, 12]
    found = json.loads(out.read_text())
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == [row["trainer"] for row in found["trainers"]]
    assert rows[0][0] == "stock" and rows[0][2:] == ["1.000", "1.000 to 1.000"]
    for row, figures in zip(rows, found["trainers"]):
        assert row[2] == f"{figures['ratio']:.3f}" and figures["low"] <= figures["ratio"] <= figures["high"]


def test_the_ratio_is_to_the_stock_trainer_in_the_same_round():
    """On a machine that gets slower, and holds SAM up in one round."""
    stock, sam = huggingface_step_cost.compared({"stock": [1.0, 2.0, 4.0], "SAM": [1.9, 4.0, 20.0]})
    assert (stock["seconds"], stock["ratio"]) == (2.0, 1.0)
    assert sam == {"trainer": "SAM", "seconds": 4.0, "ratio": 2.0, "low": 1.95, "high": 3.5}


def test_bad_input_is_named_in_a_sentence(monkeypatch, capfd):
    message = "--rounds: must be a whole number from 1, not 0"
    assert_refused("huggingface_step_cost", ["--rounds", "0"], message, monkeypatch, capfd)
