"""Pieces that translate one another start near one another."""

from __future__ import annotations

import numpy as np

from data_prep import generated
from data_prep.cleaning import words
from data_prep.embeddings import aligned_counts, embeddings


def numbered(texts: list[str], numbers: dict[str, int]) -> list[list[int]]:
    return [[numbers.setdefault(word, len(numbers)) for word in words(text)] for text in texts]


def test_translations_are_each_others_nearest():
    pairs = generated.pairs(2000, seed=1)
    numbers: dict[str, int] = {}
    german = numbered([pair.german for pair in pairs], numbers)
    english = numbered([pair.english for pair in pairs], numbers)
    unseen = len(numbers)
    sides = embeddings(aligned_counts(german, english, unseen + 1), 32)

    for side in sides:
        assert side.shape == (unseen + 1, 32)
        np.testing.assert_allclose(np.linalg.norm(side, axis=1), 1, rtol=1e-5)
    names = list(numbers)
    seen = sorted({number for text in english for number in text})
    for word, translation in (
        ("buch", "book"),
        ("bücher", "books"),
        ("frau", "woman"),
        ("weil", "because"),
        ("drei", "three"),
        ("alte", "old"),
    ):
        nearness = sides[1][seen] @ sides[0][numbers[word]]
        assert names[seen[int(nearness.argmax())]] == translation


def test_the_same_counts_give_the_same_embeddings():
    counts = aligned_counts([[0, 1], [1]], [[2, 3], [3]], 4)
    for first, second in zip(embeddings(counts, 6), embeddings(counts, 6)):
        assert first.shape == (4, 6)
        assert (first == second).all()


def test_every_english_piece_is_counted_once():
    counts = aligned_counts([[0, 1], [1], []], [[2, 3], [3], [2]], 4)
    assert counts.sum() == np.float64(3)
    assert counts[1, 3] > 1.8  # piece 3 always stands beside piece 1
