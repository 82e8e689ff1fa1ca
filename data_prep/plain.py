"""Prepares a corpus from text files that you have, a sentence a line, in any two languages.

    python -m data_prep.plain DEST --train A.de A.en --valid B.de B.en --test C.de C.en [--vocab-size N]

The endings of the names are the languages, the source first. Line n of one file is the translation of line n
of the other. DEST gets the same files as from data_prep.libreoffice_help. Each run of white space becomes one
space, and nothing else is changed: do before what else your text needs.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

from data_prep import PreparationError, corpus
from data_prep.cleaning import Pair, Rules
from data_prep.held_out import Splits
from data_prep.segmentation import SPLITS, Languages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.plain", description=__doc__.split("\n")[0])
    corpus.add_arguments(parser, vocabulary=4000)
    for name in SPLITS:
        parser.add_argument(
            f"--{name}",
            nargs=2,
            type=Path,
            required=True,
            metavar=("SOURCE", "TARGET"),
            help="a text file of each language, UTF-8, a sentence a line",
        )
    arguments = parser.parse_args()
    files = {name: tuple(getattr(arguments, name)) for name in SPLITS}
    languages = languages_of(files)
    splits = {name: read_pairs(*both) for name, both in files.items()}
    # Tells a corpus of the same files from one of what they held before.
    arguments.checksum = zlib.crc32(repr(splits).encode())
    for name, both in files.items():
        setattr(arguments, name, list(map(str, both)))

    def source(_: Rules) -> tuple[Splits, corpus.Statistics]:
        return splits, {"corpus": "your files"}

    corpus.prepare(arguments, languages, source, normalization="identity")


def languages_of(files: dict[str, tuple[Path, Path]]) -> Languages:
    """Return the endings of the names of the source and the target file, which all splits must have.

    Raises:
        PreparationError: A name has no ending, or one that fairseq does not take, or both are the same
            language, or the splits differ.
    """
    (name, first), *others = ((name, tuple(file.suffix[1:] for file in both)) for name, both in files.items())
    for file, language in zip(files[name], first):
        if not language or "-" in language:
            raise PreparationError(
                f"{file}: its name must end in a dot and a language without a hyphen, like A.de or A.pt_BR."
            )
    source, target = first
    if source == target:
        raise PreparationError(
            f"--{name} {' '.join(map(str, files[name]))}: both are of the language {source}; "
            "name a source and a target file, like A.de A.en."
        )
    for other, languages in others:
        if languages != first:
            raise PreparationError(
                f"--{other} {' '.join(map(str, files[other]))}: must end in .{source} and .{target}, "
                f"in this order, as the files of --{name} do."
            )
    return source, target


def read_pairs(source: Path, target: Path) -> list[Pair]:
    """Return the pairs of lines of two files.

    Raises:
        PreparationError: A file cannot be read, is empty or not UTF-8, or one has more lines than the other.
    """
    sides = [read_lines(file) for file in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise PreparationError(
            f"{source} has {len(sides[0])} lines and {target} has {len(sides[1])}; "
            "line n of one must be the translation of line n of the other."
        )
    return [Pair(*texts, number) for number, texts in enumerate(zip(*sides))]


def read_lines(file: Path) -> list[str]:
    """Return the lines of a UTF-8 file, which end at line feeds, with single spaces."""
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the mark with which Windows begins a file
    except OSError as error:
        raise PreparationError(f"{file}: cannot be read ({error.strerror}); name a text file.") from None
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    if not any(line.strip() for line in lines):
        raise PreparationError(f"{file}: is empty; it needs a sentence a line.")
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(" ".join(line.decode("utf-8").split()))
        except UnicodeDecodeError as error:
            raise PreparationError(
                f"{file}: line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at place "
                f"{error.start + 1}); convert the file, for example with iconv."
            ) from None
    return texts


if __name__ == "__main__":
    corpus.run(main)
