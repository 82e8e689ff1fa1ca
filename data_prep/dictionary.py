"""Reads the Ding dictionary's format: aligned alternatives of German-English entries as clean pairs.

An entry is one line, `German :: English`. `|` separates alternatives (plural, derived phrases, usage
examples), aligned across `::`; `;` separates synonyms inside an alternative. Braces, brackets, angle
brackets and parentheses hold grammar, domains, variants and explanations; `/ABC/` is an abbreviation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from data_prep.cleaning import Pair, Rules, words

MARK = re.compile(
    r"\{[^{}]*\}|\[[^\[\]]*\]|<[^<>]*>|\([^()]*\)"  # innermost brackets: removed until none is left
    r"|(?<!\S)/[^/|;]*/(?![^\s;.,!?])"  # /ABC/
)
# "jdn./etw." and "sb./sth." stand for a person or a thing: the first of the two is spelled out.
PLACEHOLDERS = {
    "jd": "jemand",
    "jds": "jemandes",
    "jdm": "jemandem",
    "jdn": "jemanden",
    "etw": "etwas",
    "sb": "somebody",
    "sth": "something",
}
PLACEHOLDER = re.compile(rf"\b({'|'.join(PLACEHOLDERS)})\.(?:/(?:{'|'.join(PLACEHOLDERS)})\.)*")
TYPOGRAPHY = str.maketrans({"\u2019": "'", "\u00b4": "'", "„": '"', "“": '"', "”": '"', "\u2013": "-"})
ORDINARY = re.compile(r"""[\w\s.,!?:;'"%€$-]*""")
FOREIGN_LETTER = re.compile(r"[^\W\d_A-Za-zÄÖÜäöüß]")


def without_marks(text: str) -> str:
    """`text` without bracketed marks and abbreviations, nested ones included."""
    while (shorter := MARK.sub(" ", text)) != text:
        text = shorter
    return text


def plain(text: str) -> str:
    """One synonym as plain text: placeholders spelled out, simple quotes, no stray spaces."""
    text = PLACEHOLDER.sub(lambda match: PLACEHOLDERS[match[1]], text.translate(TYPOGRAPHY))
    return re.sub(r"\s+([.,!?:])", r"\1", " ".join(text.split()))


def aligned_alternatives(lines: Iterable[str]) -> Iterator[Pair]:
    """Every aligned alternative of every entry, synonyms and all; entries that don't align give none."""
    for number, line in enumerate(lines):
        if line.startswith("#"):
            continue
        sides = [side.split("|") for side in without_marks(line).split(" :: ")]
        if len(sides) == 2 and len(sides[0]) == len(sides[1]):
            yield from (Pair(german, english, number) for german, english in zip(*sides))


def synonym_pairs(alternatives: Iterable[Pair]) -> Iterator[Pair]:
    """The first German synonym with the first English one, the second with the second, as far as both go.

    Synonyms of one alternative all translate one another, so every such pair is a translation.
    """
    for alternative in alternatives:
        for german, english in zip(alternative.german.split(";"), alternative.english.split(";")):
            yield Pair(plain(german), plain(english), alternative.source)


def text_on_both_sides(pair: Pair) -> bool:
    return bool(words(pair.german)) and bool(words(pair.english))


def no_slash_alternatives(pair: Pair) -> bool:
    """How many words around a slash it replaces isn't marked, so what it means can't be resolved."""
    return "/" not in pair.german + pair.english


def no_gaps(pair: Pair) -> bool:
    """An ellipsis stands for what a reader must fill in ("Rachen…")."""
    return "…" not in pair.german + pair.english and "..." not in pair.german + pair.english


def ordinary_characters(pair: Pair) -> bool:
    """No leftover markup, no symbols, no letters foreign to both languages."""
    text = pair.german + pair.english
    return bool(ORDINARY.fullmatch(text)) and not FOREIGN_LETTER.search(text)


def mostly_letters(pair: Pair) -> bool:
    return all(2 * sum(map(str.isalpha, side)) > len(side) for side in (pair.german, pair.english))


def at_most_40_words(pair: Pair) -> bool:
    return max(len(pair.german.split()), len(pair.english.split())) <= 40


def similar_length(pair: Pair) -> bool:
    """Neither side more than 2.5 times as long as the other, in characters; ten more are always allowed."""
    shorter, longer = sorted((len(pair.german), len(pair.english)))
    return longer <= 2.5 * shorter + 10


def translated(pair: Pair) -> bool:
    return words(pair.german) != words(pair.english)


def clean_pairs(lines: Iterable[str], rules: Rules) -> list[Pair]:
    """The dictionary's distinct clean pairs, in its order."""
    seen = set()

    def not_a_duplicate(pair: Pair) -> bool:
        key = words(pair.german), words(pair.english)
        return not (key in seen or seen.add(key))

    pairs = synonym_pairs(aligned_alternatives(lines))
    for rule in (
        text_on_both_sides,
        no_slash_alternatives,
        no_gaps,
        ordinary_characters,
        mostly_letters,
        at_most_40_words,
        similar_length,
        translated,
        not_a_duplicate,
    ):
        pairs = rules.apply(pairs, rule)
    return pairs
