from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.translation.gain_and_cost import FORMS
from tests.recipes.translation.scripts import script, succeeded


@pytest.mark.slow
def test_forms_stand_beside_adam_with_their_cost(corpus: Path, tmp_path: Path):
    names = ["ASAM", "late start 0.75, ASAM", "momentum, SAM", "fraction 0.25"]
    setting = ("libreoffice_8000", "--data", corpus, "--out", tmp_path, "--seeds", "1", "--forms", *names)
    setting += ("--epochs", "2", "--search-epochs", "1", "--rho", "0.1", "0.2", "--jobs", "2")
    setting += ("--cpu", "--warmup-updates", "5", "--max-tokens", "150")
    succeeded(script("gain_and_cost", *setting, "--search-only"))
    points = json.loads((tmp_path / "gain_and_cost_search.json").read_text())
    optimizers = [FORMS[name].optimizer for name in names[:3]]
    assert [(point["optimizer"], point["rho"], point["epochs"]) for point in points] == [
        (each, rho, 1) for each in optimizers for rho in (0.1, 0.2)
    ]
    assert not list(tmp_path.glob("*/test.hyp"))

    printed = succeeded(script("gain_and_cost", *setting)).stdout
    results = json.loads((tmp_path / "gain_and_cost.json").read_text())
    rows = {row["system"]: row for row in results["systems"]}
    averages = ["Adam, averaged", "momentum, SAM, averaged"]
    assert list(rows) == ["Adam", *names, *averages]
    assert all(row["passes"] == (FORMS[name].passes if name in FORMS else 1) for name, row in rows.items())
    trained = [row for name, row in rows.items() if name not in averages]
    losses = {(row["mean"]["best_valid_loss"], row["mean"]["last_train_loss"]) for row in trained}
    assert len(losses) == len(trained)
    assert (tmp_path / f"asam-2-epochs-rho-{rows['ASAM']['rho']:g}-ascent-fraction-0.25-seed-1").exists()
    assert "| late start 0.75, ASAM | " in printed and "| Adam, averaged |  | 1 | " in printed
    assert printed == (tmp_path / "gain_and_cost.md").read_text()
    over_adam, own = (rows[name]["against baseline"]["BLEU"]["difference"] for name in averages)
    over_average = results["averaged"]["momentum, SAM, averaged"]["BLEU"]["difference"]
    assert over_average == pytest.approx(own - over_adam) and f"averaged | {over_average:+.2f} (" in printed
    for picture in ("gain_and_cost.png", "gain_and_cost_search.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
