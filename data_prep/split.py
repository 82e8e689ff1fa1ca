"""Held-out sets that share nothing with the training pairs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from data_prep.cleaning import Pair, Rules, words

Splits = dict[str, list[Pair]]


def split(pairs: list[Pair], rules: Rules, held_out: int, seed: int) -> Splits:
    """Holds out `held_out` sentences for each of "test" and "valid"; what remains, phrases included, trains.

    The usage examples of one dictionary entry are variations on one word, so an entry is held out whole:
    none of its pairs is left in training or in the other held-out set. Nor does a side of a held-out
    sentence stand elsewhere, compared by its words. The held-out sets are smaller where `pairs` has too few.
    """
    by_source: dict[int, list[Pair]] = {}
    for pair in pairs:
        if pair.is_sentence():
            by_source.setdefault(pair.source, []).append(pair)
    sources = sorted(by_source)
    random.Random(seed).shuffle(sources)

    splits: Splits = {}
    held_sources: set[int] = set()
    held_sides: set[tuple[str, tuple[str, ...]]] = set()

    def sides(pair: Pair) -> set[tuple[str, tuple[str, ...]]]:
        return {("german", words(pair.german)), ("english", words(pair.english))}

    def not_from_an_entry_held_out(pair: Pair) -> bool:
        return pair.source not in held_sources

    def no_side_held_out(pair: Pair) -> bool:
        return not sides(pair) & held_sides

    for name in ("test", "valid"):
        chosen: list[Pair] = []
        while sources and len(chosen) < held_out:
            source = sources.pop()
            held_sources.add(source)
            chosen += filter(no_side_held_out, by_source[source])
        splits[name] = chosen[:held_out]
        held_sides.update(*map(sides, splits[name]))

    training = rules.apply(pairs, not_from_an_entry_held_out)
    splits["train"] = rules.apply(training, no_side_held_out)
    return splits


def without_rare_phrases(training: list[Pair], rules: Rules) -> list[Pair]:
    """The sentences among `training`, and those phrases whose every word stands in two of them or more.

    The other phrases are mostly technical terms, of which a small model learns nothing for sentences.
    """
    sentences = list(filter(Pair.is_sentence, training))
    german = Counter(word for pair in sentences for word in set(words(pair.german)))
    english = Counter(word for pair in sentences for word in set(words(pair.english)))

    def a_sentence_or_in_words_of_sentences(pair: Pair) -> bool:
        return pair.is_sentence() or (
            all(german[word] >= 2 for word in words(pair.german))
            and all(english[word] >= 2 for word in words(pair.english))
        )

    return rules.apply(training, a_sentence_or_in_words_of_sentences)


def one_word_neighbours(texts: Iterable[str], others: Iterable[str]) -> int:
    """How many of `texts` differ from one of `others` by at most one word replaced, added or left out."""

    def patterns(text: str) -> set[tuple[str | None, ...]]:
        kept = words(text)
        gaps = {(*kept[:i], None, *kept[i + 1 :]) for i in range(len(kept))}
        return gaps | {(*kept[:i], None, *kept[i:]) for i in range(len(kept) + 1)}

    known = set().union(*map(patterns, others))
    return sum(not known.isdisjoint(patterns(text)) for text in texts)
