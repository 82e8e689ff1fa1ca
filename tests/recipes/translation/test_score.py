from __future__ import annotations

import shutil
from pathlib import Path

from sacrebleu.metrics import CHRF

from tests.recipes.translation.scripts import lines, refusal, script, succeeded


def test_translations_stand_in_the_order_of_the_corpus(corpus: Path, runs: list[Path]):
    for each in runs:
        assert (each / "test.src").read_bytes() == (corpus / "test.de").read_bytes()
        assert (each / "test.ref").read_bytes() == (corpus / "test.en").read_bytes()
        hypotheses, references = lines(each / "test.hyp"), lines(each / "test.ref")
        assert len(hypotheses) == len(references)
        assert not any("\u2581" in hypothesis for hypothesis in hypotheses)
        in_order, reversed_order = (
            CHRF().corpus_score(order, [references]).score for order in (hypotheses, hypotheses[::-1])
        )
        assert in_order > reversed_order + 1


def test_a_translated_split_is_not_translated_again(corpus: Path, runs: list[Path]):
    before = {file: file.stat().st_mtime_ns for file in runs[0].iterdir()}
    assert "BLEU" in succeeded(script("score", corpus, runs[0])).stdout
    assert before == {file: file.stat().st_mtime_ns for file in runs[0].iterdir()}


def test_a_translation_of_other_sentences_is_made_again(corpus: Path, runs: list[Path], tmp_path: Path):
    """The run's corpus, with the validation set as its test set."""
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    for file in [*data.glob("valid.*"), *data.glob("bin/valid.*")]:
        shutil.copyfile(file, file.with_name(file.name.replace("valid.", "test.", 1)))
    folder.mkdir()
    for name in ("checkpoint_best.pt", "test.src", "test.ref", "test.hyp", "test.json"):
        shutil.copy2(runs[0] / name, folder / name)
    succeeded(script("score", data, folder))
    assert (folder / "test.src").read_bytes() == (corpus / "valid.de").read_bytes()
    assert (folder / "test.ref").read_bytes() == (corpus / "valid.en").read_bytes()
    assert len(lines(folder / "test.hyp")) == len(lines(corpus / "valid.en"))
    assert (folder / "test.json").read_bytes() != (runs[0] / "test.json").read_bytes()


def test_other_references_are_scored_anew(corpus: Path, runs: list[Path], tmp_path: Path):
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    shutil.copytree(runs[0], folder)
    (data / "test.en").write_bytes((folder / "test.hyp").read_bytes())
    assert "BLEU 100.00" in succeeded(script("score", data, folder)).stdout
    assert (folder / "test.ref").read_bytes() == (folder / "test.hyp").read_bytes()


def test_a_checkpoint_that_comes_during_the_translation_is_newer(
    corpus: Path, runs: list[Path], tmp_path: Path
):
    for name in ("checkpoint_best.pt", "test.src", "test.ref", "test.hyp"):
        shutil.copy2(runs[0] / name, tmp_path / name)
    succeeded(script("score", corpus, tmp_path))
    assert (tmp_path / "test.json").stat().st_mtime_ns == (runs[0] / "checkpoint_best.pt").stat().st_mtime_ns


def test_a_translation_outlives_its_checkpoint(corpus: Path, runs: list[Path], tmp_path: Path):
    """Of a run, the translation and its scores are enough: sources and references are the corpus'."""
    for name in ("test.hyp", "test.json"):
        shutil.copy2(runs[0] / name, tmp_path / name)
    again = succeeded(script("score", corpus, tmp_path)).stdout
    assert again.partition(",")[2] == succeeded(script("score", corpus, runs[0])).stdout.partition(",")[2]
    for name in ("test.src", "test.ref", "test.hyp", "test.json"):
        assert (tmp_path / name).read_bytes() == (runs[0] / name).read_bytes()


def test_a_missing_checkpoint_and_a_failure_of_fairseq_are_named(corpus: Path, tmp_path: Path):
    sentence = refusal("score", corpus, tmp_path)
    assert sentence.startswith(f"score.py: '{tmp_path / 'checkpoint_best.pt'}' is missing")

    (tmp_path / "checkpoint_best.pt").write_bytes(b"no checkpoint")
    broken = script("score", corpus, tmp_path)
    assert broken.returncode == 1
    assert "UnpicklingError" in broken.stderr
    assert (
        broken.stderr.splitlines()[-1]
        == f"fairseq-generate failed with status 1; see '{tmp_path / 'test.log'}'."
    )
