"""What is held out shares nothing with what trains."""

from __future__ import annotations

from data_prep.cleaning import Pair, Rules, words
from data_prep.generated import pairs as generated_pairs
from data_prep.split import one_word_neighbours, split, without_rare_phrases


def entries(count: int) -> list[Pair]:
    """`count` entries of two sentences and a phrase each."""
    pairs = []
    for pair in generated_pairs(2 * count, seed=5):
        pairs.append(pair._replace(source=pair.source // 2))
        if pair.source % 2:
            pairs.append(Pair(f"Nummer {pair.source}", f"number {pair.source}", pair.source // 2))
    return pairs


def sides(pairs: list[Pair]) -> set[tuple[str, ...]]:
    return {words(side) for pair in pairs for side in (pair.german, pair.english)}


def test_held_out_sets_are_sentences_of_entries_that_nothing_else_has():
    splits = split(entries(100), Rules(), held_out=30, seed=1)
    assert len(splits["test"]) == len(splits["valid"]) == 30
    assert all(pair.is_sentence() for pair in splits["test"] + splits["valid"])
    sources = [{pair.source for pair in part} for part in splits.values()]
    assert sum(map(len, sources)) == len(set().union(*sources))


def test_no_side_of_a_held_out_sentence_stands_elsewhere():
    pairs = entries(100)
    # Each sentence comes again under an entry of its own, with one side changed in case and punctuation only.
    twins = [
        Pair(pair.german.upper() + "!", f"{pair.english[:-1]} indeed.", 1000 + number)
        for number, pair in enumerate(pairs)
        if pair.is_sentence()
    ]
    splits = split(pairs + twins, Rules(), held_out=30, seed=1)
    assert not sides(splits["test"]) & sides(splits["valid"])
    assert not sides(splits["test"] + splits["valid"]) & sides(splits["train"])


def test_the_seed_alone_chooses():
    def chosen(seed: int) -> list[Pair]:
        return split(entries(100), Rules(), held_out=30, seed=seed)["test"]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)


def test_phrases_are_kept_where_two_sentences_use_each_of_their_words():
    training = [
        Pair("Der Hund hat Hunger.", "The dog is hungry.", 0),
        Pair("Der Hund ist sehr müde.", "The dog is very tired.", 1),
        Pair("der Hund", "the dog", 2),
        Pair("müde", "tired", 3),
    ]
    kept = [pair.german for pair in without_rare_phrases(training, Rules())]
    assert kept == ["Der Hund hat Hunger.", "Der Hund ist sehr müde.", "der Hund"]


def test_one_word_neighbours_are_found():
    known = ["Das ist ein Hund."]
    near = ["das ist ein Hund!", "Das ist kein Hund.", "Das ist ein alter Hund.", "Das ist Hund."]
    assert one_word_neighbours(near, known) == 4
    assert one_word_neighbours(["Das war kein Hund.", "Ein Hund ist das."], known) == 0
