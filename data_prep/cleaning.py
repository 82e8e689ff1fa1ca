"""What a translation pair is, and how pairs are compared and counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

WORD = re.compile(r"\w+")


class Pair(NamedTuple):
    """A text and its translation; `page` numbers the page that both come from."""

    source: str
    target: str
    page: int


def words(text: str) -> tuple[str, ...]:
    """Return the case-folded words without punctuation. Texts with the same words count as the same."""
    return tuple(WORD.findall(text.casefold()))


def not_a_duplicate() -> Callable[[Pair], bool]:
    """Return a rule that is true for the first of the pairs that have the same words."""
    seen: set[tuple[tuple[str, ...], ...]] = set()

    def not_a_duplicate(pair: Pair) -> bool:
        key = words(pair.source), words(pair.target)
        return not (key in seen or seen.add(key))

    return not_a_duplicate


class Rules:
    """Applies named rules one after the other and counts what each kept and dropped.

    `table` holds one row a rule, in the order of use: its name, pairs kept, pairs dropped.
    """

    def __init__(self) -> None:
        self.table: list[dict[str, str | int]] = []

    def apply(self, pairs: Iterable[Pair], rule: Callable[[Pair], bool], prefix: str = "") -> list[Pair]:
        """Return the pairs for which `rule` is true; `prefix` and the function's name are the row's name."""
        verdicts: Counter[bool] = Counter()
        kept = []
        for pair in pairs:
            verdict = bool(rule(pair))
            verdicts[verdict] += 1
            if verdict:
                kept.append(pair)
        name = prefix + rule.__name__.replace("_", " ")
        self.table.append({"rule": name, "kept": verdicts[True], "dropped": verdicts[False]})
        return kept
