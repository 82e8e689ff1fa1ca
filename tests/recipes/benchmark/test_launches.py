from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.recipes.benchmark.scripts import assert_refused, output_of, rows_of


def test_launches_are_those_of_the_form_for_accelerators(tmp_path: Path):
    text = output_of("launches", "--rounds", "3", "--beside", ROOT, "--out", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    this, beside = result["versions"]
    assert [row[0] for row in rows_of(text)] == [this["name"], beside["name"]] == ["this", "beside"]
    assert this["operations"] == beside["operations"] == sum(this["by_name"].values()) < result["weights"]
    assert this["by_name"]["_foreach_add_"] > 0  # on a CPU, weights are moved by other operations
    assert 0 < this["minimum_us"] <= this["median_us"]
    assert result["ratios"]["operations"] == 1 and result["ratios"]["time"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds: must be a whole number from 1, not 0"),
        (["--beside", "nowhere"], "--beside nowhere: there is no fairseq_asam/sharpness/kernels.py"),
    ],
)
def test_bad_input_is_named_in_a_sentence(arguments, message, monkeypatch, capfd):
    assert_refused("launches", arguments, message, monkeypatch, capfd)
