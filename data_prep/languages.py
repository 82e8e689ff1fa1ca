"""What the preparation knows of languages: their names, letters and abbreviations.

A code is that of the corpus' files, as fairseq takes it: "de", "pt_BR".
"""

from __future__ import annotations

#: All that LibreOffice's help is translated to in words between spaces, of Latin, Greek or Cyrillic letters.
#: (Debian's Slovak package is empty.)
NAMES = {
    **{"ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English"},
    **{"es": "Spanish", "et": "Estonian", "eu": "Basque", "fi": "Finnish", "fr": "French", "gl": "Galician"},
    **{"hu": "Hungarian", "id": "Indonesian", "it": "Italian", "nl": "Dutch", "om": "Oromo", "pl": "Polish"},
    **{"pt": "Portuguese", "pt_BR": "Brazilian", "ru": "Russian", "sl": "Slovenian"},
    **{"sv": "Swedish", "tr": "Turkish", "vi": "Vietnamese"},
}
#: Letters, as in a character class of a regular expression. Foreign names come in Latin ones in any language.
WESTERN = "A-Za-zÀ-ÿ"
LATIN = "A-Za-zªºÀ-ɏ\u1e00-\u1eff"
LETTERS = {
    "de": WESTERN,
    "en": WESTERN,
    "el": LATIN + "\u0370-\u03ff\u1f00-\u1fff",
    "ru": LATIN + "\u0400-\u04ff",
}
#: Words with a dot that ends no sentence, in lower case, of all languages and of some. One letter or a number
#: before a dot needs no entry.
COMMON_ABBREVIATIONS = {"ca", "etc", "max", "min", "vs"}
ABBREVIATIONS = {
    "cs": {"apod", "atd", "např", "popř", "př", "resp", "tj", "tzn", "tzv"},
    "de": {"bzw", "evtl", "ggf", "inkl", "usw", "vgl"},
    "es": {"aprox", "ej", "núm", "pág", "ud", "uds"},
    "fr": {"cf", "env", "ex", "num"},
    "ru": {"вкл", "др", "макс", "мин", "напр", "осн", "пр", "рис", "см", "стр", "эл"},
}


def name_of(language: str) -> str:
    """Return what statistics.json calls the texts of a language: its name, or the code of an unknown one."""
    return NAMES.get(language, language).lower()


def letters(language: str) -> str:
    """Return the letters of a language, for a character class of a regular expression."""
    return LETTERS.get(language, LATIN)


def abbreviations(language: str) -> set[str]:
    """Return the words of a language, in lower case, after which a dot ends no sentence."""
    return COMMON_ABBREVIATIONS | ABBREVIATIONS.get(language, set())
