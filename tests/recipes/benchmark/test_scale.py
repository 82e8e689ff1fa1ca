from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.benchmark.scripts import assert_refused, output_of, rows_of


def test_scale_has_a_row_for_every_size_and_draws_them(tmp_path: Path):
    text = output_of(
        *("scale", "--widths", "128", "64", "--max-tokens", "100", "--width", "64"),
        *("--tokens", "100", "300", "--rounds", "2", "--out", tmp_path),
    )
    result = json.loads((tmp_path / "scale.json").read_text())
    assert [row["width"] for row in result["size"]] == [64, 128]
    assert [row["max_tokens"] for row in result["batch"]] == [100, 300]
    assert len(rows_of(text)) == 4
    for row in (*result["size"], *result["batch"]):
        assert row["ratio"] > 0
        assert row["overhead_share"] == pytest.approx(row["overhead_ms"] / 1e3 / row["asam_seconds"])
    # two points are on their line
    assert result["line"]["deviation"] < 1e-6
    assert "The overhead's share of the update" in text and "ms per million weights, at every size" in text
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--widths", "64", "100"], "a width must be a multiple of 64, .* not 100"),
        (["--tokens", "512", "512"], "--tokens must be at least 2 numbers"),
        (["--tokens", "512", "9"], "at least 100, .* not 9"),
    ],
)
def test_bad_input_is_named_in_a_sentence(arguments, message, monkeypatch, capfd):
    assert_refused("scale", arguments, message, monkeypatch, capfd)
