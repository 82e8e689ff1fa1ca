from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.benchmark.scripts import assert_refused, output_of, rows_of


def test_image_step_cost_has_the_ratio_to_sgd_of_every_optimizer(tmp_path: Path):
    out = tmp_path / "new" / "out.json"
    options = ("--models", "resnet8", "--updates", "1", "--batch-size", "2", "--out", out)
    rows = rows_of(output_of("image_step_cost", *options))
    epochs = json.loads(out.read_text())["epochs"]
    assert [row[:2] for row in rows] == [["resnet8", optimizer] for optimizer in ("sgd", "sam", "asam")]
    assert epochs[0]["ratio"] == 1.0
    for row, epoch in zip(rows, epochs):
        assert row[2:] == [f"{epoch['seconds']:.3f}", f"{epoch['ratio']:.3f}"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--updates", "0"], "--updates: must be a whole number from 1, not 0"),
    ],
)
def test_bad_input_is_named_in_a_sentence(arguments, message, monkeypatch, capfd):
    assert_refused("image_step_cost", arguments, message, monkeypatch, capfd)
