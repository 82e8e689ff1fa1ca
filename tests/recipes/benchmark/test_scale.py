from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
from torch import nn

from recipes.benchmark import scale, trainers
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
    assert "The overhead's share of the update" in text and "ms per million weights, at every size" in text
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


class OnAClock:
    """A trainer: an update takes 3 seconds a pass, and *rest*, all times the pace of its round."""

    cuda = False

    def __init__(self, clock: list[float], passes: int, rest: float):
        self.clock, self.passes, self.rest = clock, passes, rest
        self.criterion, self.optimizer, self.model = self, self, nn.Linear(7, 1)

    def wait(self, seconds: float) -> None:
        self.clock[0] += seconds * self.pace

    def forward(self) -> None:
        self.wait(1.0)

    def backward(self) -> None:
        self.wait(2.0)

    def train_step(self, batches: list[dict[str, float]]) -> None:
        self.pace = batches[0]["pace"]
        for _ in range(self.passes):
            self.forward()
            self.backward()
        self.wait(self.rest)


def test_the_overhead_is_what_asam_spends_outside_of_the_passes_beyond_adam(monkeypatch):
    clock = [0.0]
    of = {"adam": OnAClock(clock, passes=1, rest=0.2), "asam": OnAClock(clock, passes=2, rest=0.5)}
    batches = [{"pace": pace, "ntokens": pace} for pace in (50.0, 2.0, 1.0, 3.0)]  # the first round warms up
    monkeypatch.setattr(trainers, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(scale, "write_corpus", lambda *arguments: None)
    monkeypatch.setattr(scale, "configuration", lambda parser, data, model, optimizer, *rest: optimizer)
    monkeypatch.setattr(scale, "trainer_and_batches", lambda optimizer: (of[optimizer], batches))
    row = scale.measure(None, argparse.Namespace(rounds=3, device="cpu"), width=64, max_tokens=100)
    assert row == {
        "width": 64,
        "weights": 8,
        "max_tokens": 100,
        "target_tokens": 2.0,
        "adam_seconds": pytest.approx(2 * 3.2),
        "asam_seconds": pytest.approx(2 * 6.5),
        "ratio": pytest.approx(6.5 / 3.2),
        "overhead_ms": pytest.approx(1000 * (0.5 - 0.2)),
        "overhead_share": pytest.approx((0.5 - 0.2) / (2 * 6.5)),
    }


def test_the_line_is_relatively_nearest_to_all_sizes():
    def rows(*overheads: float) -> list[dict[str, float]]:
        return [{"weights": 1e6 * n, "overhead_ms": ms} for n, ms in zip((1, 2, 4), overheads)]

    on_it = scale.line(rows(3.5, 4.0, 5.0))
    assert on_it == {"fixed_ms": pytest.approx(3), "ms_per_million": pytest.approx(0.5), "deviation": ANY}
    assert on_it["deviation"] < 1e-9
    assert scale.line(rows(3.5, 4.4, 5.0))["deviation"] == pytest.approx(0.063809, abs=1e-5)


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
