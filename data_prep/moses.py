"""What Moses's scripts tokenizer.perl, lowercase.perl and clean-corpus-n.perl do to a line."""

from __future__ import annotations

import re
from functools import cache

from sacremoses import MosesTokenizer

LONGEST_SENTENCE = 175
LONGEST_WORD = 1000
GREATEST_RATIO = 1.5

# Since 2018 Moses splits off the dot that ends a line, even after an abbreviation; sacremoses doesn't.
FINAL_DOT = re.compile(r"(?<=[^\s.])\.$")

_tokenizer = cache(MosesTokenizer)


def tokenize(text: str, language: str) -> str:
    """Return the tokens of `text`, separated by spaces, with the characters that Moses reserves escaped."""
    text = _tokenizer(language).tokenize(text, return_str=True).strip()
    return FINAL_DOT.sub(" .", text)


def lowercase(text: str) -> str:
    """Return `text` in lower case, letter by letter: unlike Python, Perl knows no final sigma."""
    return text.replace("\N{GREEK CAPITAL LETTER SIGMA}", "\N{GREEK SMALL LETTER SIGMA}").lower()


def is_clean(*tokenized: str) -> bool:
    """Return whether both sides have 1 to 175 tokens of at most 1,000 letters, and neither has more than 1.5
    times as many as the other."""
    sides = [text.split() for text in tokenized]
    shorter, longer = sorted(map(len, sides))
    return (
        shorter > 0
        and longer <= LONGEST_SENTENCE
        and longer / shorter <= GREATEST_RATIO
        and max(len(word) for side in sides for word in side) <= LONGEST_WORD
    )
