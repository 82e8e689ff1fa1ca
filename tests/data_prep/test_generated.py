"""The generated corpus: right German, right English, the same for the same seed."""

from __future__ import annotations

import random

import pytest

from data_prep import generated
from data_prep.corpus import STATISTICS
from data_prep.segmentation import BINARIZED, MODEL, VOCABULARY, text_files
from tests.data_prep.commands import assert_refused, contents, lines, run


def test_pairs_are_distinct_sentences_and_the_seed_alone_chooses_them():
    pairs = generated.pairs(5000, seed=1)
    assert len({pair[:2] for pair in pairs}) == 5000
    assert all(side[0].isupper() and side.endswith(".") for pair in pairs for side in pair[:2])
    assert pairs == generated.pairs(5000, seed=1)
    assert pairs[:10] != generated.pairs(10, seed=2)


def phrases(noun: generated.Noun, case: str) -> dict[str, str]:
    """The grammar's German phrases with `noun` and no adjective or "alt", and their English."""
    rng = random.Random(1)
    drawn = [generated.noun_phrase(rng, [noun], case) for _ in range(3000)]
    adjectives = ("klein", "neu", "schön", "groß")
    return {
        phrase.german: phrase.english
        for phrase in drawn
        if not any(adjective in phrase.german for adjective in adjectives)
        and not phrase.german.startswith(("drei", "vier", "fünf", "zwölf"))
    }


def test_articles_and_adjectives_agree_with_gender_number_and_case():
    noun = generated.Noun("Brief", "m", "Briefe", "letter", "letters")
    plural = {
        "die Briefe": "the letters",
        "die alten Briefe": "the old letters",
        "zwei Briefe": "two letters",
        "zwei alte Briefe": "two old letters",
    }
    assert phrases(noun, "nominative") == {
        "der Brief": "the letter",
        "der alte Brief": "the old letter",
        "ein Brief": "a letter",
        "ein alter Brief": "an old letter",
        **plural,
    }
    assert phrases(noun, "accusative") == {
        "den Brief": "the letter",
        "den alten Brief": "the old letter",
        "einen Brief": "a letter",
        "einen alten Brief": "an old letter",
        **plural,
    }


@pytest.mark.parametrize(
    ("finite", "ending", "final", "english"),
    [
        ("holt", "ab", "abholt", " picks up "),
        ("holen", "ab", "abholen", " pick up "),
        ("hat", "abgeholt", "abgeholt hat", " has picked up "),
        ("haben", "abgeholt", "abgeholt haben", " have picked up "),
        ("muss", "abholen", "abholen muss", " must pick up "),
        ("müssen", "abholen", "abholen müssen", " must pick up "),
    ],
)
def test_a_separable_verb_in_every_clause(finite, ending, final, english):
    rng = random.Random(1)
    made = (generated.clause(rng) for _ in range(5000))
    clause = next(c for c in made if c.finite == finite and c.final == final)
    assert clause.main() == f"{clause.subject} {finite} {clause.objekt} {ending}"
    assert clause.main("heute") == f"heute {finite} {clause.subject} {clause.objekt} {ending}"
    assert clause.subordinate() == f"{clause.subject} {clause.objekt} {final}"
    assert english in clause.english


def test_the_generated_corpus_comes_in_the_same_layout_as_others(tmp_path):
    arguments = ("--pairs", "300", "--held-out", "10", "20", "--workers", "1")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        result = run("generated", folder, *arguments)
        assert result.returncode == 0, result.stderr
    parts = {*text_files(generated.LANGUAGES), MODEL, VOCABULARY, BINARIZED, STATISTICS}
    assert {file.name for file in first.iterdir()} == parts
    assert [len(lines(first, f"{name}.de")) for name in ("train", "valid", "test")] == [270, 10, 20]
    assert contents(first) == contents(second)


@pytest.mark.parametrize("pairs", ["0", "1000000"])
def test_a_number_of_generated_pairs_out_of_range_is_refused(pairs, tmp_path):
    result = run("generated", tmp_path / "corpus", "--pairs", pairs)
    assert_refused(result, f"--pairs {pairs}: must be from 1 to 100000")


def test_what_is_held_out_of_the_generated_corpus_is_not_in_training():
    pairs = generated.pairs(100, seed=1)
    splits = generated.held_out(pairs, 10, 20, seed=1)
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [70, 10, 20]
    assert sorted(pair for part in splits.values() for pair in part) == sorted(pairs)
    assert splits == generated.held_out(pairs, 10, 20, seed=1) != generated.held_out(pairs, 10, 20, seed=2)
