from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.translation.scripts import script, succeeded


@pytest.mark.slow
def test_every_form_stands_beside_adam_and_asam(corpus: Path, tmp_path: Path):
    forms = ("help_8000", "--data", corpus, "--out", tmp_path, "--seeds", "1")
    forms += ("--epochs", "1", "--rho", "0.1")
    printed = succeeded(script("fewer_passes", *forms, "--jobs", "2", "--cpu")).stdout
    results = json.loads((tmp_path / "fewer_passes.json").read_text())
    names = [row["system"] for row in results["systems"]]
    assert names[:2] == ["Adam", "ASAM"] and names[2:5] == [f"fraction {f}" for f in ("0.5", "0.25", "0.125")]
    assert names[5:] == ["interval 2", "interval 5", "interval 2, alpha 0.7", "interval 5, alpha 0.7"]
    losses = {(row["mean"]["best_valid_loss"], row["mean"]["last_train_loss"]) for row in results["systems"]}
    assert len(losses) == len(names)
    assert (tmp_path / "asam-1-epochs-rho-0.1-ascent-fraction-0.25-seed-1" / "test.hyp").exists()
    assert "| interval 5 |" in printed
    assert (tmp_path / "fewer_passes.png").read_bytes().startswith(b"\x89PNG")
