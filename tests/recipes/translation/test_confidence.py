from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from recipes.translation.confidence import sums_over_tokens
from recipes.translation.train_log import read_epochs
from tests.recipes.translation.scripts import refusal, script, succeeded


def test_the_figures_by_hand():
    """Three tokens over four words, and a padding that does not count."""
    probabilities = torch.tensor(
        [
            [[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]],
            [[0.125, 0.125, 0.25, 0.5], [0.97, 0.01, 0.01, 0.01]],
        ]
    )
    sums = sums_over_tokens(probabilities.log(), torch.tensor([[0, 3], [2, 1]]), padding=1)
    assert sums["tokens"] == 3
    assert sums["negative log-likelihood"] == pytest.approx(1 + 2 + 2)
    assert sums["accuracy"] == 1  # the first; of equal probabilities, the first word counts
    assert sums["confidence"] == pytest.approx(0.5 + 0.25 + 0.5)
    assert sums["entropy"] == pytest.approx(1.75 + 2 + 1.75)


def test_the_losses_are_those_that_fairseq_validates(corpus: Path, runs: list[Path], tmp_path: Path):
    printed = succeeded(script("confidence", corpus, tmp_path, *runs)).stdout
    models = json.loads((tmp_path / "confidence.json").read_text())["models"]
    assert [model["run"] for model in models] == ["adam", "asam"]
    for model, run in zip(models, runs):
        best = min(read_epochs(run / "log"), key=lambda epoch: epoch["valid_loss"])
        assert model["loss"] == pytest.approx(best["valid_loss"], abs=2e-3)
        assert model["negative log-likelihood"] == pytest.approx(best["valid_nll_loss"], abs=2e-3)
        assert 0 < model["accuracy"] < 1 and model["confidence"] <= 1
        assert model["entropy"] < math.log2(4000)
        assert model["BLEU"] is None  # the runs have translated the test set alone
    assert printed == (tmp_path / "confidence.md").read_text()


def test_bad_input_is_named_in_one_sentence(corpus: Path, runs: list[Path], tmp_path: Path):
    assert "is missing: train the run first" in refusal("confidence", corpus, tmp_path, tmp_path / "none")
    message = refusal("confidence", corpus, tmp_path, runs[0], "--split", "dev")
    assert message.startswith("confidence.py: ") and "has no split 'dev'" in message
