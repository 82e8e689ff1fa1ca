"""Validation and test sets whose pages, and sentences, are not in training."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from data_prep.cleaning import Pair, Rules, not_a_duplicate, words

LONGEST_RUN = 4
SENTENCE_END = re.compile(r"[.!?][\"']?$")

Splits = dict[str, list[Pair]]


def hold_out_pages(pairs: list[Pair], rules: Rules, held_out: tuple[int, int], seed: int) -> Splits:
    """Hold out whole pages for validation and testing; the others train.

    Of a page held out, only sentences count that no other page has, not even with one word changed, in either
    language. So neither they nor such near ones are in training or in the other set.

    Args:
        pairs: All clean pairs, in the order of their pages.
        rules: Gets a row for each step.
        held_out: The least number of sentences for validation and for testing. The sets are smaller where
            there are too few.
        seed: Chooses the pages.

    Returns:
        The distinct pairs of "train", "valid" and "test".
    """
    elsewhere = _OtherPages(pairs)

    def not_nearly_on_another_page(pair: Pair) -> bool:
        return pair not in elsewhere

    candidates = pairs
    for rule in (a_sentence_of_5_words_or_more, not_nearly_on_another_page, not_a_duplicate()):
        candidates = rules.apply(candidates, rule, "to hold out: ")
    by_page: dict[int, list[Pair]] = {}
    for pair in candidates:
        by_page.setdefault(pair.page, []).append(pair)
    pages = sorted(by_page)
    random.Random(seed).shuffle(pages)

    splits: Splits = {}
    for name, least in zip(("valid", "test"), held_out):
        splits[name] = []
        while pages and len(splits[name]) < least:
            splits[name] += by_page.pop(pages.pop())
    chosen = {pair.page for name in splits for pair in splits[name]}

    def not_from_a_page_held_out(pair: Pair) -> bool:
        return pair.page not in chosen

    training = pairs
    for rule in (not_from_a_page_held_out, not_a_duplicate()):
        training = rules.apply(training, rule, "to train: ")
    return {"train": training, **splits}


def a_sentence_of_5_words_or_more(pair: Pair) -> bool:
    sides = pair.source, pair.target
    return all(SENTENCE_END.search(side) and len(words(side)) >= 5 for side in sides)


class _OtherPages:
    """Holds the pairs that stand, or nearly stand, on a page other than their own, in either language.

    Sentences are compared by their words, without case, punctuation and numbers. Two are near where leaving
    at most one word out of each makes them equal: a word is added, left out, replaced or moved.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._pages: dict[int, int | None] = {}
        for pair in pairs:
            for pattern in self._patterns(pair):
                if self._pages.setdefault(pattern, pair.page) != pair.page:
                    self._pages[pattern] = None  # on several

    def __contains__(self, pair: Pair) -> bool:
        return any(self._pages[pattern] != pair.page for pattern in self._patterns(pair))

    @staticmethod
    def _patterns(pair: Pair) -> Iterator[int]:
        """Yield a number for each side and for each way to leave a word out of it."""
        for language, side in enumerate((pair.source, pair.target)):
            kept = tuple(word for word in words(side) if not word.isdigit())
            yield hash((language, kept))
            for i in range(len(kept)):
                yield hash((language, kept[:i] + kept[i + 1 :]))


def known_runs(texts: Iterable[str], training: Iterable[str]) -> list[float]:
    """Return which share of the runs of 1, 2, 3 and 4 words in `texts` stand somewhere in `training`."""
    known: set[tuple[str, ...]] = set()
    for text in training:
        known.update(_runs(text))
    found: Counter[tuple[int, bool]] = Counter()
    for text in texts:
        found.update((len(run), run in known) for run in _runs(text))
    return [
        round(found[length, True] / max(1, found[length, True] + found[length, False]), 3)
        for length in range(1, LONGEST_RUN + 1)
    ]


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    text_words = words(text)
    for length in range(1, LONGEST_RUN + 1):
        for start in range(len(text_words) - length + 1):
            yield text_words[start : start + length]
