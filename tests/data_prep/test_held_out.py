"""What is held out shares no page and no sentence, nor nearly, with what trains."""

from __future__ import annotations

import difflib
import itertools

import pytest

from data_prep import generated
from data_prep.cleaning import Pair, Rules, words
from data_prep.held_out import Splits, hold_out_pages, known_runs

PAGE_SENTENCES = 5


def pages(count: int) -> list[Pair]:
    pairs = generated.pairs(PAGE_SENTENCES * count, seed=5)
    return [pair._replace(page=pair.page // PAGE_SENTENCES) for pair in pairs]


def split(pairs: list[Pair], seed: int = 1) -> Splits:
    return hold_out_pages(pairs, Rules(), (20, 40), seed)


def sides(pairs: list[Pair]) -> set[tuple[str, ...]]:
    return {words(side) for pair in pairs for side in pair[:2]}


def is_near(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Return whether one word at most is added, left out or replaced between `a` and `b`."""
    changes = [
        step
        for step in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
        if step[0] != "equal"
    ]
    return sum(max(end - start, last - first) for _, start, end, first, last in changes) <= 1


def test_pages_are_held_out_whole():
    splits = split(pages(100))
    assert 20 <= len(splits["valid"]) < 20 + PAGE_SENTENCES
    assert 40 <= len(splits["test"]) < 40 + PAGE_SENTENCES
    sources = [{pair.page for pair in pairs} for pairs in splits.values()]
    assert sum(map(len, sources)) == len(set().union(*sources))


def test_no_side_held_out_is_in_training_or_one_word_from_it():
    splits = split(pages(100))
    held_out = splits["valid"] + splits["test"]
    assert not any(is_near(a, b) for a, b in itertools.product(sides(held_out), sides(splits["train"])))


@pytest.mark.parametrize(
    "twin",
    [
        lambda text: text.upper(),
        lambda text: text[:-1] + " 17 18 19!",
        lambda text: text[:-1] + " indeed.",
        lambda text: text.partition(" ")[2],
        lambda text: "Indeed " + text.partition(" ")[2],
    ],
)
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_sentence_is_not_held_out_if_another_page_has_one_like_it(side, twin):
    """Every sentence of half of the pages has a twin of one side on another page."""
    pairs = pages(100)
    marked = [
        Pair(
            "Ganz anders ist dieser Satz hier.", "This sentence here is quite different.", 1000 + i
        )._replace(**{side: twin(getattr(pair, side))})
        for i, pair in enumerate(pairs)
        if pair.page % 2
    ]
    splits = split(pairs + marked)
    assert splits["test"] and splits["valid"]
    assert all(pair.page % 2 == 0 for pair in splits["valid"] + splits["test"])


def test_only_sentences_of_five_words_are_held_out_and_all_else_trains():
    short = [Pair(f"Seite {i} hilft hier.", f"Page {i} helps here.", i) for i in range(100)]
    heading = [
        Pair(f"Eine Überschrift der Seite {'i' * i}", f"A heading of the page {'i' * i}", i)
        for i in range(100)
    ]
    splits = split(pages(100) + short + heading)
    assert all(pair.target.endswith(".") and len(words(pair.target)) >= 5 for pair in splits["test"])
    assert {"page", "heading"} <= {word for pair in splits["train"] for word in words(pair.target)}


def test_pairs_are_distinct():
    pairs = pages(100)
    splits = split([pair for pair in pairs for _ in range(2)])
    for part in splits.values():
        assert len({(words(pair.source), words(pair.target)) for pair in part}) == len(part)


def test_the_seed_alone_chooses():
    assert split(pages(100)) == split(pages(100))
    assert split(pages(100))["test"] != split(pages(100), seed=2)["test"]


def test_known_runs():
    assert known_runs(["The dog barks loudly.", "dog"], ["the dog", "A CAT barks", "dog barks"]) == [
        0.8,
        0.667,
        0,
        0,
    ]
