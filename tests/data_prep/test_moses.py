"""What Moses's scripts do to a line."""

from __future__ import annotations

import pytest

from data_prep import moses


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "He said: 'No.'", "He said : &apos; No . &apos;"),
        ("en", "In 1990's, it's 5,300...", "In 1990 &apos;s , it &apos;s 5,300 ..."),
        ("de", "Dr. Meier wohnt z.B. im 3. Stock.", "Dr. Meier wohnt z.B. im 3. Stock ."),
        ("de", "Dr. Meier kam um 5.", "Dr. Meier kam um 5 ."),
        ("en", "So am I.", "So am I ."),
        ("en", "And so on...", "And so on ..."),
        ("en", "...", "..."),
        ("de", "Ost-West [a|b] <c> & d", "Ost-West &#91; a &#124; b &#93; &lt; c &gt; &amp; d"),
    ],
)
def test_tokens_are_those_of_moses(language, text, expected):
    assert moses.tokenize(text, language) == expected


def test_lower_case_is_letter_by_letter():
    assert moses.lowercase("ΟΔΟΣ ÄÖ &amp;") == "οδοσ äö &amp;"


@pytest.mark.parametrize(
    ("german", "english", "clean"),
    [
        ("a b c", "a b", True),
        ("a b c d", "a b", False),
        ("a", "", False),
        ("", "", False),
        ("a", "b" * 1001, False),
    ],
)
def test_clean_pairs(german, english, clean):
    assert moses.is_clean(german, english) is clean
    assert moses.is_clean(english, german) is clean
