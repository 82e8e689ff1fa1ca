from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from tests.commands import ROOT
from tests.iwslt14_archive import archived, contents
from tests.recipes.translation.scripts import lines, refusal, script, succeeded


@pytest.mark.slow
def test_table_5_over_two_seeds(corpus: Path, tmp_path: Path):
    table5 = ("libreoffice_8000", "--data", corpus, "--out", tmp_path, "--seeds", "1", "2", "--epochs", "2")
    table5 += ("--rho", "0.1", "0.2", "--jobs", "2", "--cpu")
    printed = succeeded(script("table5", *table5)).stdout
    results = json.loads((tmp_path / "table5.json").read_text())
    systems = ["Adam", "Adam, twice the epochs", "Adam+SAM", "Adam+ASAM"]
    assert [row["system"] for row in results["systems"]] == [*systems, *(f"{s}, averaged" for s in systems)]
    references = lines(corpus / "test.en")
    for row in results["systems"]:
        for scale in ("test BLEU", "test chrF2", "test BLEU of tokens"):
            scores = [figures[scale] for figures in row["runs"]]
            assert row["mean"][scale] == pytest.approx(np.mean(scores))
            assert row["sd"][scale] == pytest.approx(np.std(scores, ddof=1))
        optimizer = row["system"].split(",")[0].split("+")[-1].lower()
        rho = "" if row["rho"] is None else f"-rho-{row['rho']:g}"
        part = "average/test.hyp" if row["system"].endswith("averaged") else "test.hyp"
        for seed, figures in zip((1, 2), row["runs"]):
            translated = lines(tmp_path / f"{optimizer}-{row['epochs']}-epochs{rho}-seed-{seed}" / part)
            assert figures["test BLEU"] == pytest.approx(BLEU().corpus_score(translated, [references]).score)
        if row["system"] != "Adam":
            difference = row["mean"]["test BLEU"] - results["systems"][0]["mean"]["test BLEU"]
            assert row["against baseline"]["BLEU"]["difference"] == pytest.approx(difference)
    assert "| Adam+ASAM |" in printed
    assert printed == (tmp_path / "table5.md").read_text()
    assert {file.name for file in tmp_path.glob("*.png")} == {"rho_search.png", "curves.png"}
    # Again, nothing is missing.
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*.pt")}
    assert succeeded(script("table5", *table5)).stdout == printed
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*.pt")}
    # A table of other epochs takes rho from this search.
    rho = {row["system"]: row["rho"] for row in results["systems"]}
    other = (*table5[: table5.index("--seeds")], "--seeds", "1", "--epochs", "1", "--search-epochs", "2")
    succeeded(script("table5", *other, "--rho", "0.1", "0.2", "--jobs", "2", "--cpu"))
    points = json.loads((tmp_path / "rho_search.json").read_text())
    assert {point["epochs"] for point in points} == {2} and len(points) == 4
    rows = json.loads((tmp_path / "table5.json").read_text())["systems"]
    assert {row["system"]: row["rho"] for row in rows} == rho
    assert {row["epochs"] for row in rows} == {1, 2}


def test_a_search_of_no_epochs_is_refused(corpus: Path, tmp_path: Path):
    message = refusal(
        "table5", "libreoffice_8000", "--data", corpus, "--out", tmp_path, "--search-epochs", "0"
    )
    assert message.endswith("error: argument --search-epochs: must be a whole number from 1, not 0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_papers_experiment_on_an_archive_like_its_own(tmp_path: Path):
    """table5.py iwslt14, but for the size of the model: best checkpoint by BLEU, text detokenized."""
    archive, corpus, out = (tmp_path / name for name in ("de-en.tgz", "iwslt14", "out"))
    archived(archive, contents())
    prepare = (sys.executable, "-m", "data_prep.iwslt14", str(corpus), "--archive", str(archive))
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
    size = [f"--{side}-{what}" for side in ("encoder", "decoder") for what in ("layers=1", "embed-dim=32")]
    size += ["--encoder-attention-heads=2", "--decoder-attention-heads=2", "--warmup-updates=20", "--lr=5e-3"]
    few = ("--epochs", "2", "--seeds", "1", "--rho", "0.1", "--jobs", "2", "--cpu", *size)
    printed = succeeded(script("table5", "iwslt14", "--data", corpus, "--out", out, *few)).stdout
    assert "| Adam+ASAM | " in printed and " | 35.66 | 35.02 |" in printed
    run_folder = out / "asam-2-epochs-rho-0.1-seed-1"
    assert "best_bleu" in (run_folder / "log").read_text()
    assert "arch='transformer_iwslt_de_en'" in (run_folder / "log").read_text()
    tokens, text = lines(corpus / "test.en"), lines(run_folder / "test.ref")
    assert any(" ." in line for line in tokens) and not any(" ." in line for line in text)
    assert not any("@@" in line for line in lines(run_folder / "test.hyp"))
