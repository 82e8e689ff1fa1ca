from __future__ import annotations

from pathlib import Path

import torch

from tests.commands import checkpoint
from tests.recipes.translation.scripts import refusal, script, succeeded


def test_the_last_epochs_average_in_float64(corpus: Path, runs: list[Path], tmp_path: Path):
    weights = [checkpoint(runs[0], f"checkpoint{epoch}.pt")["model"] for epoch in (4, 5)]
    succeeded(script("average", runs[0], tmp_path / "mean", "--last", "2"))
    mean = checkpoint(tmp_path / "mean", "checkpoint_best.pt")["model"]
    assert all(
        torch.equal(mean[name], ((weight.double() + weights[1][name].double()) / 2).float())
        for name, weight in weights[0].items()
    )
    succeeded(script("score", corpus, tmp_path / "mean"))

    too_many = script("average", runs[0], tmp_path / "mean", "--last", "3")
    assert "has the checkpoints of 2 epochs, not of 3" in too_many.stderr
    none = refusal("average", runs[0], tmp_path / "mean", "--last", "0")
    assert none.endswith("--last: must be a whole number from 1, not 0")
