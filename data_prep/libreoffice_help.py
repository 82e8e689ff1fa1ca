"""Prepares sentences of LibreOffice's help and their English translations, from Debian's packages of it.

    python -m data_prep.libreoffice_help DEST [--source-language de]
        [--source-package PACKAGE --target-package PACKAGE] [--vocab-size N] [--held-out VALID TEST]
        [--training-pairs N] [--seed N]

DEST gets {train,valid,test}.{de,en}, sentencepiece.model and .vocab, bin/ for fairseq, and statistics.json.
All languages have the same pages, whose paragraphs have the same ids.
Where the German packages can't be had, the generated corpus stands in, and the output says so.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from data_prep import PreparationError, corpus, debian, generated
from data_prep.cleaning import Pair, Rules, words
from data_prep.held_out import Splits, hold_out_pages
from data_prep.help_pages import paragraphs
from data_prep.languages import NAMES, abbreviations, letters
from data_prep.segmentation import Languages

TARGET = "en"
SOURCES = [language for language in NAMES if language != TARGET]
RELEASE = re.compile(r'class="logo"[^>]*><p[^>]*>[^<]*LibreOffice (\d+\.\d+)')
STAND_IN_PAIRS = 10_000

#: French has spaces within quotation marks, and Spanish has ▸ between menu and entry.
OWN_TYPOGRAPHY = {"fr": (re.compile(r"«\s+|\s+»"), '"'), "es": (re.compile("▸"), "-")}
TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u2039\u203a\u00b4`", "'")
    | dict.fromkeys("\u2011\u2013\u2014\u2212", "-")
    | {"\N{SOFT HYPHEN}": None, "\N{ZERO WIDTH SPACE}": None}
)
# German names of menu entries end in an ellipsis where a dialog follows; English ones do not.
ELLIPSIS_OF_A_NAME = re.compile(r"(?<=\w)…(?!\w)")
SPACE_BEFORE_MARK = re.compile(r"\s+(?=[.,;:!?)](?!\w))")
SENTENCE_BOUNDARY = re.compile(r"""(\w*)[.!?]["')]*\s+(?=["'(¿¡]*([^\W\d_]))""")
SENTENCE_MARKS = ".!?:"
ORDINARY = re.compile(r"""([\w\s.,;:!?¿¡…'"()\[\]%&$€°/+-]|(?<=l)·(?=l))*""")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.libreoffice_help", description=__doc__.split("\n")[0]
    )
    corpus.add_arguments(parser, vocabulary=4000)
    corpus.add_held_out(parser, (1000, 2000))
    parser.add_argument(
        "--training-pairs", type=int, metavar="N", help="pairs to train on, drawn at random (default: all)"
    )
    parser.add_argument(
        "--source-language",
        default="de",
        metavar="CODE",
        help=f"what is translated to English: {', '.join(SOURCES)} (default: %(default)s)",
    )
    for side, package in (("source", package_of("LANGUAGE")), ("target", package_of(TARGET))):
        parser.add_argument(
            f"--{side}-package",
            type=Path,
            metavar="PACKAGE",
            help=f"a local {package} .deb, or the folder where it is unpacked (default: the "
            "installed package, or else apt-get downloads it)",
        )
    arguments = parser.parse_args()
    if arguments.source_language not in SOURCES:
        raise PreparationError(
            f"--source-language {arguments.source_language}: no language that the help is prepared from; "
            f"choose from {', '.join(SOURCES)}."
        )
    if (arguments.source_package is None) != (arguments.target_package is None):
        raise PreparationError(
            "--source-package and --target-package name a package each: give both, or none."
        )
    wanted = arguments.training_pairs
    if wanted is not None and wanted < 1:
        raise PreparationError(f"--training-pairs {wanted}: must be at least 1.")
    languages = arguments.source_language, TARGET

    def source(rules: Rules) -> tuple[Splits, corpus.Statistics]:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                roots = _unpacked(arguments, languages, Path(scratch))
            except debian.Unavailable as reason:
                if languages != generated.LANGUAGES:
                    raise PreparationError(
                        f"--source-language {languages[0]}: the packages of the help can't be had "
                        f"({reason}); get them elsewhere and give them after --source-package and "
                        "--target-package."
                    ) from None
                note = f"The generated corpus stands in for the help, which can't be had ({reason})."
                print(note, file=sys.stderr)
                pairs = generated.pairs(STAND_IN_PAIRS, arguments.seed)
                splits = generated.held_out(pairs, *arguments.held_out, arguments.seed)
                return draw_training(splits, wanted, arguments.seed), {"corpus": "generated", "note": note}
            release, pairs = read_pairs(roots)
        clean_pairs = clean(pairs, languages, rules)
        splits = hold_out_pages(clean_pairs, rules, arguments.held_out, arguments.seed)
        return draw_training(splits, wanted, arguments.seed), {"corpus": f"help of LibreOffice {release}"}

    corpus.prepare(arguments, languages, source)


def package_of(language: str) -> str:
    """Return the name of Debian's package of the help in a language."""
    return "libreoffice-help-" + ("en-us" if language == TARGET else language.lower().replace("_", "-"))


def pages_of(language: str) -> str:
    """Return the folder of the pages in that package."""
    folder = "en-US" if language == TARGET else language.replace("_", "-")
    return f"usr/share/libreoffice/help/{folder}/text"


def _unpacked(arguments: argparse.Namespace, languages: Languages, scratch: Path) -> dict[str, Path]:
    """Return, by language, a folder that holds the package's files; packages are unpacked in `scratch`."""
    packages = [arguments.source_package, arguments.target_package]
    if not all(packages):
        if all(Path("/", pages_of(language)).is_dir() for language in languages):
            return dict.fromkeys(languages, Path("/"))
        packages = debian.download([package_of(language) for language in languages], scratch)
    roots = {}
    for language, package in zip(languages, packages):
        name, pages = package_of(language), pages_of(language)
        roots[language] = package
        if not package.is_dir():
            roots[language] = scratch / language
            debian.unpack(package, pages, roots[language], name)
        if not (roots[language] / pages).is_dir():
            raise PreparationError(
                f"{package}: holds no {pages}, so it is not {name}; get that with `apt-get download {name}`."
            )
    return roots


def read_pairs(roots: dict[str, Path]) -> tuple[str, list[Pair]]:
    """Read the pairs of sentences from the two packages.

    Args:
        roots: A folder that holds the package's files, for the source language and the target language.

    Returns:
        LibreOffice's release, like "7.4", and the pairs, in the order of pages and of texts in them.

    Raises:
        PreparationError: A package has no pages, or the two are of different releases, or their pages or
            paragraphs do not match.
    """
    source, target = roots
    folders = {language: root / pages_of(language) for language, root in roots.items()}
    pages = {
        language: {file.relative_to(folder).as_posix() for file in folder.rglob("*.html")}
        for language, folder in folders.items()
    }
    for language, names in pages.items():
        if not names:
            raise PreparationError(
                f"{folders[language]}: holds no page; get {package_of(language)} again with "
                f"`apt-get download {package_of(language)}`."
            )
    both = sorted(pages[source] & pages[target])
    releases: dict[str, set[str]] = {language: set() for language in roots}
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
        for place, text in texts[source].items():
            if place in texts[target]:
                matched += 1
                found = sentence_pairs((text, texts[target][place]), (source, target))
                pairs += (Pair(*sides, number) for sides in found)
    release = {language: ", ".join(sorted(names)) or "none" for language, names in releases.items()}
    if release[source] != release[target]:
        raise PreparationError(
            f"the {NAMES[source]} pages are of LibreOffice {release[source]}, the English ones of "
            f"{release[target]}; get both packages of one release."
        )
    if 2 * matched <= places:
        raise PreparationError(
            f"{folders[source]} and {folders[target]}: only {matched} of {places} paragraphs have the same "
            "id on the same page; get both packages of one release."
        )
    return release[source], pairs


def sentence_pairs(paragraphs: tuple[str, str], languages: Languages) -> Iterator[tuple[str, str]]:
    """Yield the sentences of two paragraphs where both have equally many, or else the paragraphs."""
    sides = [list(sentences(*side)) for side in zip(paragraphs, languages)]
    if len(sides[0]) == len(sides[1]):
        yield from zip(*sides)
    else:
        yield " ".join(sides[0]), " ".join(sides[1])


def sentences(paragraph: str, language: str) -> Iterator[str]:
    """Yield the sentences of a paragraph, with simple quotes and dashes. A line break ends a sentence."""
    no_end = abbreviations(language)
    if language in OWN_TYPOGRAPHY:
        marks, simple = OWN_TYPOGRAPHY[language]
        paragraph = marks.sub(simple, paragraph)
    for line in paragraph.translate(TYPOGRAPHY).split("\n"):
        line = SPACE_BEFORE_MARK.sub("", ELLIPSIS_OF_A_NAME.sub("", line.replace("...", "…")))
        start = 0
        for boundary in SENTENCE_BOUNDARY.finditer(line):
            # "z. B.", "usw.", "1. Januar"
            word, first_letter = boundary.groups()
            if not first_letter.isupper() or len(word) == 1 or word.isdigit() or word.lower() in no_end:
                continue
            yield line[start : boundary.end()].strip()
            start = boundary.end()
        yield line[start:]


def clean(pairs: Iterable[Pair], languages: Languages, rules: Rules) -> list[Pair]:
    """Return the pairs that pass all rules."""
    for rule in (
        text_on_both_sides,
        as_many_sentences(languages),
        ends_alike,
        no_code_or_symbols(languages),
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
    return bool(words(pair.source)) and bool(words(pair.target))


def as_many_sentences(languages: Languages) -> Callable[[Pair], bool]:
    """Return a rule: where one side has more sentences, it often says more."""

    def as_many_sentences(pair: Pair) -> bool:
        source, target = (len(list(sentences(*side))) for side in zip(pair, languages))
        return source == target

    return as_many_sentences


def ends_alike(pair: Pair) -> bool:
    """Where one side alone ends like a sentence, the other is often a part of one."""
    return len({side[-1:] in SENTENCE_MARKS for side in pair[:2]}) == 1


def no_code_or_symbols(languages: Languages) -> Callable[[Pair], bool]:
    """Return a rule: no character of code, formulas and tables of symbols alone, no letter of others."""
    foreign = [re.compile(rf"[^\W\d_{letters(language)}]|_") for language in languages]

    def no_code_or_symbols(pair: Pair) -> bool:
        return all(ORDINARY.fullmatch(side) and not other.search(side) for side, other in zip(pair, foreign))

    return no_code_or_symbols


def mostly_letters(pair: Pair) -> bool:
    return all(2 * sum(map(str.isalpha, side)) > len(side) for side in (pair.source, pair.target))


def at_most_60_words(pair: Pair) -> bool:
    return max(len(pair.source.split()), len(pair.target.split())) <= 60


def similar_length(pair: Pair) -> bool:
    """Neither side more than twice as long as the other, in characters; ten more are always allowed."""
    shorter, longer = sorted((len(pair.source), len(pair.target)))
    return longer <= 2 * shorter + 10


def translated(pair: Pair) -> bool:
    return words(pair.source) != words(pair.target)


if __name__ == "__main__":
    corpus.run(main)
