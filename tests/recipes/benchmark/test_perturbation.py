from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import FOR_INFERENCE_TOO
from tests.recipes.benchmark.scripts import assert_refused, output_of, rows_of


def test_perturbation_without_others_has_no_ratio(tmp_path: Path):
    text = output_of("perturbation", "--rounds", "1", "--out", tmp_path / "new" / "out.json")
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    weights = 52073472 if FOR_INFERENCE_TOO else 39469056
    assert (result["weights"], result["rounds"]) == (weights, 1)
    ours = next(figure for figure in result["figures"] if figure["name"] == "fairseq_asam")
    assert 0 < ours["minimum_ms"] <= ours["median_ms"]
    assert [row[0] for row in rows_of(text)] == [figure["name"] for figure in result["figures"]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds: must be a whole number from 1, not 0"),
        (["--davda54", "no.py"], "no.py: no such file"),
    ],
)
def test_bad_input_is_named_in_a_sentence(arguments, message, monkeypatch, capfd):
    assert_refused("perturbation", arguments, message, monkeypatch, capfd)
