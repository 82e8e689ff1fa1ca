"""Prepares IWSLT'14 German-English as fairseq documents it, without Moses's Perl scripts.

    python -m data_prep.iwslt14 DEST [--archive FILE] [--workers N]

DEST gets {train,valid,test}.{de,en} (tokenized by Moses's rules, in lower case), bpe.codes (10,000 merges of
both languages), bin/ for fairseq, and statistics.json. Without --archive, the public archive is downloaded to
the folder that DEST is in, as de-en.tgz.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import Pool
from multiprocessing.pool import Pool as Processes
from pathlib import Path

from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe
from tqdm import tqdm

from data_prep import PreparationError, archive, corpus, moses
from data_prep.segmentation import BINARIZED, SPLITS, preprocess, text_files, write_whole

LANGUAGES = ("de", "en")
PAIR = "-".join(LANGUAGES)
TRAINING = f"train.tags.{PAIR}"
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
TEST_FILES = tuple(f"IWSLT14.{name}.{PAIR}" for name in TEST_SETS)
FILES = (
    *(f"{TRAINING}.{language}" for language in LANGUAGES),
    *(f"{name}.{language}.xml" for name in TEST_FILES for language in LANGUAGES),
)
ABOUT_THE_TALK = re.compile(r"<(url|talkid|keywords)>|^<(speaker|reviewer|translator)\b")
TITLE_TAG = re.compile(r"</?(title|description)>")
SEGMENT_START, SEGMENT_END = re.compile(r'<seg id="[0-9]*">\s*'), re.compile(r"\s*</seg>\s*")
VALIDATION_STEP = 23

CODES = "bpe.codes"
MERGES = 10_000
PUBLISHED = {"train": 160_239, "valid": 7_283, "test": 6_750}
NEEDED_MEGABYTES = 300
LINES_A_TASK = 200


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.iwslt14", description=__doc__.split("\n")[0])
    parser.add_argument("destination", metavar="DEST", type=Path, help="folder to make")
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help=f"a local copy of de-en.tgz (default: beside DEST, downloaded from {archive.URL})",
    )
    corpus.add_workers(parser)
    arguments = parser.parse_args()
    if arguments.workers < 1:
        raise PreparationError(f"--workers {arguments.workers}: must be at least 1.")
    destination, file = arguments.destination, arguments.archive
    settings = {"archive": str(file) if file else archive.URL}
    local = file or destination.parent / "de-en.tgz"
    made_of = corpus.read_statistics(destination).get("archive")
    if made_of and local.is_file() and archive.fingerprint(local) != made_of:
        raise PreparationError(
            f"{destination}: was prepared from another {local}; name another folder, or remove this one."
        )

    def build_from_archive(unfinished: Path) -> None:
        if file is None:
            archive.fetch(archive.URL, local)
        elif not (file.is_file() and os.access(file, os.R_OK)):
            raise PreparationError(
                f"--archive {file}: no file that can be read; name a copy of de-en.tgz, or leave it out."
            )
        build(unfinished, local, settings, arguments.workers)

    parts = (*text_files(LANGUAGES), CODES, BINARIZED)
    with corpus.writing(destination, NEEDED_MEGABYTES):
        corpus.complete(destination, settings, parts, build_from_archive)
    statistics = corpus.read_statistics(destination)
    print(", ".join(f"{name}: {count} pairs" for name, count in statistics["pairs"].items()))
    if "warning" in statistics:
        print(f"warning: {statistics['warning']}", file=sys.stderr)


def build(unfinished: Path, file: Path, settings: corpus.Statistics, workers: int) -> None:
    """Make all parts in the folder `unfinished`, or leave no folder."""
    shutil.rmtree(unfinished, ignore_errors=True)
    scratch = unfinished / "scratch"
    scratch.mkdir(parents=True)
    try:
        archive.extract(file, FILES, PAIR, scratch)
        ignore_interrupts = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        with Pool(workers, **ignore_interrupts) as processes:
            found = make_training_text(scratch, unfinished, processes)
            make_test_text(scratch, unfinished, processes)
            learn_codes(unfinished)
            pieces = {name: segment(unfinished, name, scratch, processes) for name in text_files(LANGUAGES)}
        # As documented, each language has a dictionary of its own.
        preprocess(scratch, LANGUAGES, unfinished / BINARIZED, workers)
        pairs = {name: sum(1 for _ in read(unfinished / f"{name}.de")) for name in SPLITS}
        statistics = {
            "corpus": "IWSLT'14 DE-EN",
            "settings": settings,
            "archive": archive.fingerprint(file),
            "versions": {package: version(package) for package in ("sacremoses", "subword-nmt")},
            "training pairs in the archive": found,
            "pairs": pairs,
            "published pairs": PUBLISHED,
            "pieces": pieces,
        }
        if pairs != PUBLISHED:
            published = ", ".join(f"{name}: {count}" for name, count in PUBLISHED.items())
            statistics["warning"] = (
                f"these aren't the published numbers of pairs ({published}), "
                "so scores can't be compared with published ones."
            )
        corpus.write_statistics(unfinished, statistics)
        shutil.rmtree(scratch)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read(file: Path) -> Iterator[str]:
    """Yield the lines of `file`, which end at line feeds alone."""
    with file.open(encoding="utf-8", newline="\n") as text:
        try:
            for line in text:
                yield line.rstrip("\n")
        except UnicodeDecodeError:
            raise PreparationError(
                f"{file.name} in the archive is not UTF-8 text; get the archive from {archive.URL}."
            ) from None


def training_lines(file: Path) -> Iterator[str]:
    """Yield the sentences, titles and descriptions in `file`, without tags."""
    return (TITLE_TAG.sub("", line) for line in read(file) if not ABOUT_THE_TALK.search(line))


def test_lines(file: Path) -> Iterator[str]:
    """Yield the segments in the XML `file`, with plain apostrophes; as documented, entities stay."""
    for line in read(file):
        if "<seg id" in line:
            yield SEGMENT_END.sub("", SEGMENT_START.sub("", line)).replace("\u2019", "'")


def aligned(name: str, german: Iterator[str], english: Iterator[str]) -> list[tuple[str, str]]:
    """Return the pairs of lines; raise PreparationError where one language has more lines than the other."""
    german, english = list(german), list(english)
    if len(german) != len(english):
        raise PreparationError(
            f"{name} in the archive has {len(german)} German lines and {len(english)} English ones, "
            f"which can't be paired; get the archive from {archive.URL}."
        )
    return list(zip(german, english))


def make_training_text(scratch: Path, folder: Path, processes: Processes) -> int:
    """Write the clean pairs to valid (every 23rd) and train; return the number of pairs before cleaning."""
    pairs = aligned(TRAINING, *(training_lines(scratch / f"{TRAINING}.{language}") for language in LANGUAGES))
    tokenized = tqdm(
        processes.imap(tokenized_pair, pairs, LINES_A_TASK),
        "tokenizing the training text",
        len(pairs),
        unit="pair",
        disable=None,
    )
    clean = [pair for pair in tokenized if moses.is_clean(*pair)]
    if len(clean) < VALIDATION_STEP:
        raise PreparationError(
            f"{TRAINING} in the archive has {len(clean)} clean pairs, where a validation set takes at least "
            f"{VALIDATION_STEP}; get the archive from {archive.URL}."
        )
    write_pairs(folder, "valid", clean[VALIDATION_STEP - 1 :: VALIDATION_STEP])
    del clean[VALIDATION_STEP - 1 :: VALIDATION_STEP]
    write_pairs(folder, "train", clean)
    return len(pairs)


def make_test_text(scratch: Path, folder: Path, processes: Processes) -> None:
    """Write the documented test set: two development sets and three test sets, one after the other."""
    pairs: list[tuple[str, str]] = []
    for name in TEST_FILES:
        pairs += aligned(name, *(test_lines(scratch / f"{name}.{language}.xml") for language in LANGUAGES))
    write_pairs(folder, "test", processes.map(tokenized_pair, pairs, LINES_A_TASK))


def tokenized_pair(pair: tuple[str, str]) -> tuple[str, ...]:
    return tuple(moses.tokenize(text, language) for text, language in zip(pair, LANGUAGES))


def write_pairs(folder: Path, name: str, pairs: list[tuple[str, ...]]) -> None:
    for language, texts in zip(LANGUAGES, zip(*pairs)):
        write_whole(folder / f"{name}.{language}", (moses.lowercase(text) + "\n" for text in texts))


def learn_codes(folder: Path) -> None:
    """Write the merges that subword-nmt learns from the training text of both languages."""
    print(f"learning {MERGES} merges", flush=True)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    text = itertools.chain.from_iterable(read(folder / f"train.{language}") for language in LANGUAGES)
    with (folder / CODES).open("w", encoding="utf-8") as codes, quiet:
        learn_bpe(text, codes, MERGES)


def segment(folder: Path, name: str, segmented: Path, processes: Processes) -> int:
    """Write the pieces of the text `folder`/`name` to `segmented`/`name`; return their number."""
    pieces = list(processes.imap(partial(segmented_line, folder / CODES), read(folder / name), LINES_A_TASK))
    write_whole(segmented / name, (line + "\n" for line in pieces))
    return sum(len(line.split()) for line in pieces)


def segmented_line(codes: Path, line: str) -> str:
    return _bpe(codes).process_line(line)


@cache
def _bpe(codes: Path) -> BPE:
    with codes.open(encoding="utf-8") as lines:
        return BPE(lines)


if __name__ == "__main__":
    corpus.run(main)
