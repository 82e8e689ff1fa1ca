"""What a translation pair is, and how pairs are compared and counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

WORD = re.compile(r"\w+")
SENTENCE_END = re.compile(r"[.!?][\"']?$")
SENTENCE_WORDS = 4


class Pair(NamedTuple):
    """A German text and its translation; `source` numbers the dictionary entry both come from."""

    german: str
    english: str
    source: int

    def is_sentence(self) -> bool:
        """True where both sides end like a sentence and have at least four words."""
        return all(SENTENCE_END.search(side) and len(side.split()) >= SENTENCE_WORDS for side in self[:2])


def words(text: str) -> tuple[str, ...]:
    """The case-folded words without punctuation: two texts with the same words count as the same."""
    return tuple(WORD.findall(text.casefold()))


class Rules:
    """Applies named rules one after the other and counts what each kept and dropped.

    `table` holds one row a rule, in the order of use: its name, pairs kept, pairs dropped.
    """

    def __init__(self) -> None:
        self.table: list[dict[str, str | int]] = []

    def apply(self, pairs: Iterable[Pair], rule: Callable[[Pair], bool]) -> list[Pair]:
        """The pairs for which `rule` is true. The rule's function name, in words, names the row."""
        verdicts: Counter[bool] = Counter()
        kept = []
        for pair in pairs:
            verdict = bool(rule(pair))
            verdicts[verdict] += 1
            if verdict:
                kept.append(pair)
        name = rule.__name__.replace("_", " ")
        self.table.append({"rule": name, "kept": verdicts[True], "dropped": verdicts[False]})
        return kept
