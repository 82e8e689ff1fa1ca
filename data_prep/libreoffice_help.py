"""Prepares German-English sentences of LibreOffice's help, from Debian's packages of it.

    python -m data_prep.libreoffice_help DEST [--german PACKAGE --english PACKAGE] [--vocab-size N]
        [--held-out VALID TEST] [--training-pairs N] [--seed N]

DEST gets {train,valid,test}.{de,en}, sentencepiece.model and .vocab, bin/ for fairseq, and statistics.json.
Both languages have the same pages, whose paragraphs have the same ids.
Where the packages can't be had, the generated corpus stands in, and the output says so.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from data_prep import PreparationError, corpus, debian, generated
from data_prep.cleaning import Pair, Rules, words
from data_prep.held_out import Splits, hold_out_pages
from data_prep.help_pages import paragraphs

PACKAGES = {"de": "libreoffice-help-de", "en": "libreoffice-help-en-us"}
PAGES = {"de": "usr/share/libreoffice/help/de/text", "en": "usr/share/libreoffice/help/en-US/text"}
RELEASE = re.compile(r'class="logo"[^>]*><p[^>]*>[^<]*LibreOffice (\d+\.\d+)')
STAND_IN_PAIRS = 10_000

TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u2039\u203a\u00b4`", "'")
    | dict.fromkeys("\u2011\u2013\u2014\u2212", "-")
    | {"\N{SOFT HYPHEN}": None, "\N{ZERO WIDTH SPACE}": None}
)
# German names of menu entries end in an ellipsis where a dialog follows; English ones do not.
ELLIPSIS_OF_A_NAME = re.compile(r"(?<=\w)…(?!\w)")
SPACE_BEFORE_MARK = re.compile(r"\s+(?=[.,;:!?)](?!\w))")
SENTENCE_BOUNDARY = re.compile(r"""(\w*)[.!?]["')]*\s+(?=["'(]?[A-ZÄÖÜ])""")
ABBREVIATIONS = {"bzw", "ca", "etc", "evtl", "ggf", "inkl", "max", "min", "usw", "vgl", "vs"}
SENTENCE_MARKS = ".!?:"
ORDINARY = re.compile(r"""[\w\s.,;:!?…'"()\[\]%&$€°/+-]*""")
FOREIGN = re.compile(r"[^\W\d_A-Za-zÀ-ÿ]|_")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.libreoffice_help", description=__doc__.split("\n")[0]
    )
    corpus.add_arguments(parser, vocabulary=4000, held_out=(1000, 2000))
    parser.add_argument(
        "--training-pairs", type=int, metavar="N", help="pairs to train on, drawn at random (default: all)"
    )
    for option, language in (("--german", "de"), ("--english", "en")):
        parser.add_argument(
            option,
            type=Path,
            metavar="PACKAGE",
            help=f"a local {PACKAGES[language]} .deb, or the folder where it is unpacked (default: the "
            "installed package, or else apt-get downloads it)",
        )
    arguments = parser.parse_args()
    if (arguments.german is None) != (arguments.english is None):
        raise PreparationError("--german and --english name a package each: give both, or none.")
    wanted = arguments.training_pairs
    if wanted is not None and wanted < 1:
        raise PreparationError(f"--training-pairs {wanted}: must be at least 1.")

    def source(rules: Rules) -> tuple[Splits, corpus.Statistics]:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                roots = _unpacked(arguments, Path(scratch))
            except debian.Unavailable as reason:
                note = f"The generated corpus stands in for the help, which can't be had ({reason})."
                print(note, file=sys.stderr)
                pairs = generated.pairs(STAND_IN_PAIRS, arguments.seed)
                splits = generated.held_out(pairs, *arguments.held_out, arguments.seed)
                return draw_training(splits, wanted, arguments.seed), {"corpus": "generated", "note": note}
            release, pairs = read_pairs(roots)
        splits = hold_out_pages(clean(pairs, rules), rules, arguments.held_out, arguments.seed)
        return draw_training(splits, wanted, arguments.seed), {"corpus": f"help of LibreOffice {release}"}

    corpus.prepare(arguments, source)


def _unpacked(arguments: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Return, by language, a folder that holds the package's files; packages are unpacked in `scratch`."""
    named = {"de": arguments.german, "en": arguments.english}
    if not all(named.values()):
        if all(Path("/", folder).is_dir() for folder in PAGES.values()):
            return dict.fromkeys(PAGES, Path("/"))
        named = dict(zip(PACKAGES, debian.download(list(PACKAGES.values()), scratch)))
    for language, package in named.items():
        if not package.is_dir():
            named[language] = scratch / language
            debian.unpack(package, named[language], PACKAGES[language])
        if not (named[language] / PAGES[language]).is_dir():
            raise PreparationError(
                f"{package}: holds no {PAGES[language]}, so it is not {PACKAGES[language]}; "
                f"get that with `apt-get download {PACKAGES[language]}`."
            )
    return named


def read_pairs(roots: dict[str, Path]) -> tuple[str, list[Pair]]:
    """Read the pairs of sentences from the two packages.

    Args:
        roots: By language, a folder that holds the package's files.

    Returns:
        LibreOffice's release, like "7.4", and the pairs, in the order of pages and of texts in them.

    Raises:
        PreparationError: A package has no pages, or the two are of different releases, or their pages or
            paragraphs do not match.
    """
    folders = {language: roots[language] / PAGES[language] for language in PAGES}
    pages = {
        language: {file.relative_to(folder).as_posix() for file in folder.rglob("*.html")}
        for language, folder in folders.items()
    }
    for language, names in pages.items():
        if not names:
            raise PreparationError(
                f"{folders[language]}: holds no page; get {PACKAGES[language]} again with "
                f"`apt-get download {PACKAGES[language]}`."
            )
    both = sorted(pages["de"] & pages["en"])
    releases: dict[str, set[str]] = {language: set() for language in PAGES}
    pairs: list[Pair] = []
    places = matched = 0
    for number, name in enumerate(tqdm(both, "reading the help", unit="page", disable=None)):
        texts = {}
        for language, folder in folders.items():
            try:
                html = (folder / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise PreparationError(f"{folder / name}: not UTF-8 text; get the package again.") from None
            releases[language].update(RELEASE.findall(html))
            texts[language] = paragraphs(html, name.partition("/")[0])
        places += max(map(len, texts.values()))
        for place, german in texts["de"].items():
            if place in texts["en"]:
                matched += 1
                pairs += (Pair(*sides, number) for sides in sentence_pairs(german, texts["en"][place]))
    found = {language: ", ".join(sorted(names)) or "none" for language, names in releases.items()}
    if found["de"] != found["en"]:
        raise PreparationError(
            f"the German pages are of LibreOffice {found['de']}, the English ones of {found['en']}; "
            "get both packages of one release."
        )
    if 2 * matched <= places:
        raise PreparationError(
            f"{folders['de']} and {folders['en']}: only {matched} of {places} paragraphs have the same id on "
            "the same page; get both packages of one release."
        )
    return found["de"], pairs


def sentence_pairs(german: str, english: str) -> Iterator[tuple[str, str]]:
    """Yield the sentences of two paragraphs where both have equally many, or else the paragraphs."""
    sides = list(sentences(german)), list(sentences(english))
    if len(sides[0]) == len(sides[1]):
        yield from zip(*sides)
    else:
        yield " ".join(sides[0]), " ".join(sides[1])


def sentences(paragraph: str) -> Iterator[str]:
    """Yield the sentences of a paragraph, with simple quotes and dashes. A line break ends a sentence."""
    for line in paragraph.translate(TYPOGRAPHY).split("\n"):
        line = SPACE_BEFORE_MARK.sub("", ELLIPSIS_OF_A_NAME.sub("", line.replace("...", "…")))
        start = 0
        for boundary in SENTENCE_BOUNDARY.finditer(line):
            # "z. B.", "usw.", "1. Januar"
            word = boundary[1]
            if len(word) == 1 or word.isdigit() or word.lower() in ABBREVIATIONS:
                continue
            yield line[start : boundary.end()].strip()
            start = boundary.end()
        yield line[start:]


def clean(pairs: Iterable[Pair], rules: Rules) -> list[Pair]:
    """Return the pairs that pass all rules."""
    for rule in (
        text_on_both_sides,
        as_many_sentences,
        ends_alike,
        no_code_or_symbols,
        mostly_letters,
        at_most_60_words,
        similar_length,
        translated,
    ):
        pairs = rules.apply(pairs, rule)
    return list(pairs)


def draw_training(splits: Splits, wanted: int | None, seed: int) -> Splits:
    """Return the splits with *wanted* random pairs of the training set, in its order, or with all of them."""
    training = splits["train"]
    if wanted is None:
        return splits
    if wanted > len(training):
        raise PreparationError(f"--training-pairs {wanted}: only {len(training)} can be had; choose fewer.")
    chosen = sorted(random.Random(seed).sample(range(len(training)), wanted))
    return {**splits, "train": [training[number] for number in chosen]}


def text_on_both_sides(pair: Pair) -> bool:
    return bool(words(pair.german)) and bool(words(pair.english))


def as_many_sentences(pair: Pair) -> bool:
    """Where one side has more sentences, it often says more."""
    return len(list(sentences(pair.german))) == len(list(sentences(pair.english)))


def ends_alike(pair: Pair) -> bool:
    """Where one side alone ends like a sentence, the other is often a part of one."""
    return len({side[-1:] in SENTENCE_MARKS for side in (pair.german, pair.english)}) == 1


def no_code_or_symbols(pair: Pair) -> bool:
    """No character that only code, formulas and tables of symbols have, and no letter of other languages."""
    text = pair.german + pair.english
    return bool(ORDINARY.fullmatch(text)) and not FOREIGN.search(text)


def mostly_letters(pair: Pair) -> bool:
    return all(2 * sum(map(str.isalpha, side)) > len(side) for side in (pair.german, pair.english))


def at_most_60_words(pair: Pair) -> bool:
    return max(len(pair.german.split()), len(pair.english.split())) <= 60


def similar_length(pair: Pair) -> bool:
    """Neither side more than twice as long as the other, in characters; ten more are always allowed."""
    shorter, longer = sorted((len(pair.german), len(pair.english)))
    return longer <= 2 * shorter + 10


def translated(pair: Pair) -> bool:
    return words(pair.german) != words(pair.english)


if __name__ == "__main__":
    corpus.run(main)
