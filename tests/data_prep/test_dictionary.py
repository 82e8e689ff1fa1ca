"""What becomes of an entry of the dictionary."""

from __future__ import annotations

import pytest

from data_prep.cleaning import Rules
from data_prep.dictionary import clean_pairs

ENTRIES = {
    "alternatives are aligned": (
        "Hund {m} | Hunde {pl} | Der Hund hat mich gebissen. :: dog | dogs | The dog has bitten me.",
        [("Hund", "dog"), ("Hunde", "dogs"), ("Der Hund hat mich gebissen.", "The dog has bitten me.")],
    ),
    "alternatives that don't align give nothing": ("Hund {m} | Hunde {pl} :: dog", []),
    "synonyms go in pairs as far as both sides have them": (
        "Eile {f}; Hast {f}; Hetze {f} :: hurry; haste",
        [("Eile", "hurry"), ("Hast", "haste")],
    ),
    "grammar, domain, variant and explanation are left out": (
        "etw. (Altes) absetzen {vt} [med.] <ab setzen> (Mittel (stark)) :: to stop sth. {stopped} [Br.]",
        [("etwas absetzen", "to stop something")],
    ),
    "separators inside brackets separate nothing": (
        "trotz {prp; +Gen.; +Dat. [ugs.]} :: despite (a fact; a thing)",
        [("trotz", "despite")],
    ),
    "an abbreviation is left out": (
        "Schwebstaub {m} [envir.] :: particulate matter /PM/",
        [("Schwebstaub", "particulate matter")],
    ),
    "placeholders are spelled out, a person before a thing": (
        "jdm. jdn./etw. vorstellen; jds. Freund sein :: to present sb./sth. to sb.; to be sb.'s friend",
        [
            ("jemandem jemanden vorstellen", "to present somebody to somebody"),
            ("jemandes Freund sein", "to be somebody's friend"),
        ],
    ),
    "typographic quotes and dashes become plain": (
        "„Geht\u2019s?“ \u2013 „Ich komme.“ :: 'Fine?' \u2013 'I\u2019m coming.'",
        [('"Geht\'s?" - "Ich komme."', "'Fine?' - 'I'm coming.'")],
    ),
    "no space is left before a full stop": (
        "Ich komme (später). :: I am coming (later).",
        [("Ich komme.", "I am coming.")],
    ),
    "slashes, gaps, symbols and foreign letters give nothing": (
        "der alte/neue Hund | Rachen… | Tee ~ | Curaçao :: the old dog | pharyngeal | tea | orange liqueur",
        [],
    ),
    "figures alone give nothing": ("1 2 3 4 5 m :: 1 2 3 4 5 m of it", []),
    "an English explanation instead of a translation gives nothing": (
        "Jause {f} :: a light meal that Austrians eat in the afternoon",
        [],
    ),
    "what stays the same is no translation": ("Hamburger {m} :: hamburger", []),
    "a comment is no entry": ("# Name :: Value", []),
    "a line without a translation gives nothing": ("Hund {m}", []),
}


@pytest.mark.parametrize(("entry", "expected"), ENTRIES.values(), ids=ENTRIES)
def test_entry(entry, expected):
    assert [(pair.german, pair.english) for pair in clean_pairs([entry], Rules())] == expected


def test_a_pair_is_kept_once_whatever_its_case_and_punctuation():
    rules = Rules()
    entries = [
        "Komm jetzt mit! :: Come along now!",
        "komm jetzt mit :: come along now",
        "Komm jetzt mit! :: Come!",
    ]
    assert [pair.english for pair in clean_pairs(entries, rules)] == ["Come along now!", "Come!"]
    assert rules.table[-1] == {"rule": "not a duplicate", "kept": 2, "dropped": 1}


@pytest.mark.parametrize(
    ("german", "english", "sentence"),
    [
        ("Der Hund hat mich gebissen.", "The dog has bitten me.", True),
        ("Er rief: Das ist gut!", 'He cried: "That is good!"', True),
        ("Der Hund hat mich gebissen", "The dog has bitten me.", False),
        ("Der Hund hat mich gebissen.", "I was bitten.", False),
        ("Das geht.", "That will do it.", False),
    ],
)
def test_a_sentence_ends_like_one_and_has_four_words_on_both_sides(german, english, sentence):
    (pair,) = clean_pairs([f"{german} :: {english}"], Rules())
    assert pair.is_sentence() is sentence
