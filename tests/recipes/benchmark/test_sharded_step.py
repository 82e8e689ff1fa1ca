from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", minversion="2.6", reason="fully_shard is public from torch 2.6 on")

from tests.recipes.benchmark.scripts import assert_refused, output_of, rows_of


@pytest.mark.slow
def test_sharded_step_has_time_traffic_and_memory_of_every_optimizer(tmp_path: Path):
    text = output_of(
        *("sharded_step", "--layers", "1", "--width", "32", "--context", "16", "--batch-size", "2"),
        *("--rounds", "1", "--updates", "1", "--out", tmp_path / "out.json"),
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row[0] for row in rows_of(text)] == 2 * ["adam", "sam", "asam"]
    adam, *others = result["seconds"]
    assert adam["ratio"] == 1 and adam["sent_bytes"]["all-reduce"] == 0
    for row in others:
        assert row["seconds"] > 0 and row["ratio"] > 0
        assert row["sent_bytes"]["all-reduce"] == 24
        for kind in ("all-gather", "reduce-scatter"):
            assert row["sent_bytes"][kind] == 2 * adam["sent_bytes"][kind] > 0
    adam, *others = result["memory"]
    assert adam["copies"] == 0 and 0.99 < adam["share"] < 1
    assert all(row["peak_bytes"] > 0 and 0.9 < row["share"] < 1.1 for row in others)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "argument --rounds: must be a whole number from 1, not 0"),
        (["--width", "40"], "--width must be a multiple of 32, not 40"),
        (["--batch-size", "5"], "--batch-size must be a multiple of --processes 2, not 5"),
    ],
)
def test_bad_input_is_named_in_a_sentence(arguments, message, monkeypatch, capfd):
    assert_refused("sharded_step", arguments, message, monkeypatch, capfd)
