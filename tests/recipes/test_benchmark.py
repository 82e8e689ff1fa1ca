"""The benchmarks of a training step, on small models and batches: what they print and write."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

STAGES = [
    "forward at w",
    "backward at w",
    "perturb",
    "forward at w + epsilon",
    "backward at w + epsilon",
    "restore",
    "step of the optimizer",
]


def output_of(script: str, *arguments: str | Path) -> str:
    """What the script printed; it must have ended well."""
    command = [sys.executable, "-m", f"recipes.benchmark.{script}", *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def rows_of(text: str) -> list[list[str]]:
    """The cells of every row of the tables in a text, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("|:-")]
    headings = {*rules, *(i - 1 for i in rules)}
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for i, line in enumerate(lines)
        if i not in headings
    ]


def test_step_cost_has_the_time_and_the_memory_of_every_optimizer(tmp_path: Path):
    optimizers = ["adam", "asam --ascent-interval 2", "sam --ascent-fraction 0.25"]
    text = output_of(
        *("step_cost", "--models", "quickstart", "--max-tokens", "100", "--rounds", "2"),
        *("--optimizers", *optimizers, "--out", tmp_path / "out.json"),
    )
    (model,) = json.loads((tmp_path / "out.json").read_text())["models"]
    assert model["weights"] == 1355264 and 50 < model["target_tokens"] <= 100
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


def test_profile_step_accounts_for_all_of_the_update(tmp_path: Path):
    trace, out = tmp_path / "trace.json", tmp_path / "out.json"
    text = output_of(
        *("profile_step", "--model", "quickstart", "--max-tokens", "100", "--updates", "2"),
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


def test_perturbation_without_others_has_no_ratio(tmp_path: Path):
    text = output_of("perturbation", "--rounds", "1", "--out", tmp_path / "new" / "out.json")
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    assert (result["weights"], result["rounds"]) == (39469056, 1)
    ours = next(figure for figure in result["figures"] if figure["name"] == "fairseq_asam")
    assert 0 < ours["minimum_ms"] <= ours["median_ms"]
    assert [row[0] for row in rows_of(text)] == [figure["name"] for figure in result["figures"]]


def test_image_step_cost_has_the_ratio_to_sgd_of_every_optimizer(tmp_path: Path):
    out = tmp_path / "new" / "out.json"
    options = ("--models", "resnet8", "--updates", "1", "--batch-size", "2", "--out", out)
    rows = rows_of(output_of("image_step_cost", *options))
    epochs = json.loads(out.read_text())["epochs"]
    assert [row[:2] for row in rows] == [["resnet8", optimizer] for optimizer in ("sgd", "sam", "asam")]
    assert epochs[0]["ratio"] == 1.0
    for row, epoch in zip(rows, epochs):
        assert row[2:] == [f"{epoch['seconds']:.3f}", f"{epoch['ratio']:.3f}"]


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
    "script, arguments, message",
    [
        ("step_cost", ["--rounds", "0"], "--rounds must be at least 1, not 0"),
        ("step_cost", ["--threads", "0"], "--threads must be at least 1, not 0"),
        ("step_cost", ["--max-tokens", "20"], "--max-tokens must be at least 100, .* not 20"),
        ("step_cost", ["--models", "resnet"], "invalid choice: 'resnet'"),
        ("step_cost", ["--optimizers", "adam", "asam --roh 1"], "'--optimizer asam --roh 1': .*--roh"),
        ("step_cost", ["--optimizers", "adam", "lion"], "'--optimizer lion': .*invalid choice: 'lion'"),
        ("profile_step", ["--updates", "0"], "--updates must be at least 1, not 0"),
        ("scale", ["--widths", "64", "100"], "a width must be a multiple of 64, .* not 100"),
        ("scale", ["--tokens", "512", "512"], "--tokens must be at least 2 numbers"),
        ("scale", ["--tokens", "512", "9"], "at least 100, .* not 9"),
        ("perturbation", ["--rounds", "0"], "--rounds must be at least 1, not 0"),
        ("perturbation", ["--davda54", "no.py"], "no.py: no such file"),
        ("image_step_cost", ["--updates", "0"], "--batch-size and --updates must be at least 1"),
        ("sharded_step", ["--rounds", "0"], "argument --rounds: must be at least 1, not 0"),
        ("sharded_step", ["--width", "40"], "--width must be a multiple of 32, not 40"),
        ("sharded_step", ["--batch-size", "5"], "--batch-size must be a multiple of --processes 2, not 5"),
    ],
)
def test_bad_input_is_named_in_a_sentence(monkeypatch, capfd, script: str, arguments: list, message: str):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"recipes.benchmark.{script}").main()
    assert end.value.code == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith(f"{script}.py: error: ")
    assert re.search(message, last)
