from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.recipes.translation.scripts import PAIRED, compared, refusal, run, succeeded


def test_the_table_agrees_with_the_sacrebleu_command(runs: list[Path], tmp_path: Path):
    results = compared(tmp_path, runs)
    hypotheses = [each / "test.hyp" for each in runs]
    paired = run("sacrebleu", runs[0] / "test.ref", "-i", *hypotheses, *PAIRED)
    for system, theirs in zip(results["systems"], json.loads(succeeded(paired).stdout)):
        assert system["BLEU"] == pytest.approx(
            {
                "score": theirs["BLEU"]["score"],
                "mean": theirs["BLEU"]["mean"],
                "ci95": theirs["BLEU"]["ci"],
                "p_value": theirs["BLEU"]["p_value"],
            }
        )
    for system, hypothesis in zip(results["systems"], hypotheses):
        chrf = run("sacrebleu", runs[0] / "test.ref", "-i", hypothesis, "-m", "chrf", "-b", "-w", "6")
        assert float(succeeded(chrf).stdout) == pytest.approx(system["chrF2"]["score"], abs=1e-6)
    bleu = results["systems"][1]["BLEU"]["score"]
    assert f"| {bleu:.2f} (" in (tmp_path / "results.md").read_text()


def test_a_missing_run_is_named_in_one_sentence(tmp_path: Path):
    nothing = tmp_path / "nothing"
    for name in ("compare", "curves", "samples"):
        file = nothing / ("test.hyp" if name == "samples" else "log")
        sentence = refusal(name, tmp_path / "out", nothing)
        assert sentence.startswith(f"{name}.py: '{file}' is missing")
    assert list(tmp_path.iterdir()) == []


def test_runs_of_other_sentences_are_not_compared(runs: list[Path], tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(runs[1], other, ignore=shutil.ignore_patterns("*.pt"))
    references = (other / "test.ref").read_text().splitlines(keepends=True)
    (other / "test.ref").write_text("".join(references[::-1]))
    for name in ("compare", "samples"):
        sentence = refusal(name, tmp_path / "out", runs[0], other)
        assert sentence == f"'{other}/test.ref' is not '{runs[0]}/test.ref': compare runs of one corpus."
    assert not (tmp_path / "out").exists()
