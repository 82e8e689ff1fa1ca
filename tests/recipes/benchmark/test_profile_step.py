from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.benchmark.scripts import assert_refused, output_of, rows_of

STAGES = [
    "forward at w",
    "backward at w",
    "perturb",
    "forward at w + epsilon",
    "backward at w + epsilon",
    "restore",
    "step of the optimizer",
]


def test_profile_step_accounts_for_all_of_the_update(tmp_path: Path):
    trace, out = tmp_path / "trace.json", tmp_path / "out.json"
    text = output_of(
        *("profile_step", "--model", "small", "--max-tokens", "100", "--updates", "2"),
        *("--operators", "4", "--trace", trace, "--out", out),
    )
    result = json.loads(out.read_text())
    *stages, rest, whole = result["stages"]
    assert [row["stage"] for row in stages] == STAGES
    assert all(row["ms"] > 0 for row in stages)
    assert sum(row["ms"] for row in (*stages, rest)) == pytest.approx(whole["ms"])
    assert 0 <= rest["share"] < 0.5
    assert "aten::mm" in [row["operator"] for row in result["operators"]]
    assert [row[0] for row in rows_of(text)] == [
        *STAGES,
        "the rest",
        "all",
        *(row["operator"] for row in result["operators"]),
    ]
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert all(names.count(stage) >= 2 for stage in STAGES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--updates", "0"], "--updates: must be a whole number from 1, not 0"),
    ],
)
def test_bad_input_is_named_in_a_sentence(arguments, message, monkeypatch, capfd):
    assert_refused("profile_step", arguments, message, monkeypatch, capfd)
