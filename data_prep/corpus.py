"""The corpus folder: raw text, a joint sentencepiece model, fairseq's binarized form, statistics.

A folder is built beside its destination, as `.NAME.partial`, and renamed when it is whole. After an
interruption, the next run with the same settings goes on from what is there. One process at a time builds it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep import PreparationError
from data_prep.cleaning import Rules, words
from data_prep.held_out import LONGEST_RUN, Splits, known_runs
from data_prep.languages import name_of
from data_prep.segmentation import (
    BINARIZED,
    MODEL,
    SPLITS,
    VOCABULARY,
    Languages,
    binarize,
    text_files,
    train_sentencepiece,
    write_whole,
)

STATISTICS = "statistics.json"
SMALLEST_VOCABULARY = 100
#: What corpora have been made with whose statistics.json does not say it: those of earlier versions.
EARLIER_SETTINGS = {"source_language": "de"}

Statistics = dict[str, Any]
Source = Callable[[Rules], "tuple[Splits, Statistics]"]


def add_arguments(parser: argparse.ArgumentParser, vocabulary: int) -> None:
    """Add the arguments that every corpus has; `vocabulary` is the default number of pieces."""
    parser.add_argument("destination", metavar="DEST", type=Path, help="folder to make")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=vocabulary,
        metavar="N",
        help="sentencepiece pieces, shared by both languages; a corpus too small for N gets fewer "
        "(default: %(default)s)",
    )
    add_workers(parser)


def add_held_out(parser: argparse.ArgumentParser, held_out: tuple[int, int]) -> None:
    """Add the arguments of a corpus that holds sentences out itself.

    Args:
        parser: Gets the arguments.
        held_out: The default number of sentences in the validation and in the test set.
    """
    parser.add_argument(
        "--held-out",
        type=int,
        nargs=2,
        default=list(held_out),
        metavar=("VALID", "TEST"),
        help=f"sentences in the validation and in the test set (default: {held_out[0]} {held_out[1]})",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="decides which sentences are held out (default: %(default)s)"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the argument --workers."""
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes at a time (default: all %(default)s cores)",
    )


def run(main: Callable[[], None]) -> None:
    """Call `main`; what stops it becomes one sentence on stderr and an exit status that is not 0."""
    try:
        main()
    except PreparationError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to go on.")


def prepare(
    arguments: argparse.Namespace, languages: Languages, source: Source, normalization: str = "nmt_nfkc"
) -> None:
    """Make the corpus folder, or what is missing of it, and print the tables of counts.

    Args:
        arguments: The command line. All arguments but the workers tell one corpus from another.
        languages: What the names of the files of text end in: two codes without a hyphen.
        source: Gives the splits, and what statistics.json is to say about them. It is called only where the
            text is not there yet.
        normalization: sentencepiece's rule for the letters of pieces. "identity" leaves them as they are.

    Raises:
        PreparationError: An argument is out of range, the destination cannot be written or holds something
            else, or the sentences are too few.
    """
    if arguments.vocab_size < SMALLEST_VOCABULARY:
        raise PreparationError(
            f"--vocab-size {arguments.vocab_size}: must be at least {SMALLEST_VOCABULARY}, "
            "because letters and marks alone take most of that."
        )
    numbers = {"--workers": [arguments.workers]}
    if "held_out" in arguments:
        numbers["--held-out"] = arguments.held_out
    for option, values in numbers.items():
        if min(values) < 1:
            raise PreparationError(f"{option} {' '.join(map(str, values))}: must be at least 1.")
    if len(set(languages)) < 2 or any(not language or "-" in language for language in languages):
        raise PreparationError(
            f"{' and '.join(languages)}: must be two languages without a hyphen, like de and pt_BR."
        )
    destination = arguments.destination
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("destination", "workers")
    }
    build = functools.partial(
        _build, destination.resolve(), settings, languages, arguments.workers, source, normalization
    )
    with writing(destination, megabytes=200):
        complete(destination, settings, (*text_files(languages), MODEL, VOCABULARY, BINARIZED), build)
    _print_summary(read_statistics(destination))


def complete(
    destination: Path, settings: Statistics, parts: tuple[str, ...], build: Callable[[Path], None]
) -> None:
    """Make `destination`, unless it has all `parts`; one process at a time does so.

    Args:
        destination: The folder.
        settings: What tells one corpus from another.
        parts: The names of what must be there.
        build: Makes all parts in the folder that it is given, which then takes the name of the destination.

    Raises:
        PreparationError: The destination holds something else.
    """
    if not is_whole(destination, settings, parts):
        place = destination.resolve()  # it may be a link, or "."
        partial = place.with_name(f".{place.name}.partial")
        with _alone(place.with_name(f".{place.name}.lock")):
            if not is_whole(place, settings, parts):  # made by a process that had the lock
                build(partial)
                if place.exists():  # empty, or a corpus of these settings that lost a part
                    shutil.rmtree(place)
                os.replace(partial, place)
                return
    print(f"{destination} is complete: nothing to do.")


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is in the block with the same file `lock`, which goes in the end."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Another process makes the same folder ({lock}); waiting for it.", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                continue  # the other process has removed it
            try:
                return (yield)
            finally:
                lock.unlink()


@contextlib.contextmanager
def writing(destination: Path, megabytes: int) -> Iterator[None]:
    """Turn an OSError into a PreparationError that says what `destination` must be like."""
    try:
        yield
    except OSError as error:
        raise PreparationError(
            f"{destination}: cannot be written ({error.strerror}: {error.filename}); "
            f"choose a folder that you may write to, with {megabytes} MB free."
        ) from None


def is_whole(folder: Path, settings: Statistics, parts: tuple[str, ...]) -> bool:
    """Return whether `folder` has all `parts`; raise PreparationError where it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not read_statistics(folder):
        raise PreparationError(f"{folder}: exists and is no corpus made here; name a new folder.")
    for name, found, wanted in _differing(folder, settings):
        raise PreparationError(
            f"{folder}: was prepared with {name} {found}, not {wanted}; "
            "name another folder, or remove this one."
        )
    return all((folder / part).exists() for part in parts)


def _differing(folder: Path, settings: Statistics) -> Iterator[tuple[str, Any, Any]]:
    """Yield each setting that the corpus in `folder` does not share: its name, and both values."""
    found = {name: value for name, value in EARLIER_SETTINGS.items() if name in settings}
    found.update(read_statistics(folder)["settings"])
    for name in {**settings, **found}:
        if found.get(name) != settings.get(name):
            yield name, found.get(name), settings.get(name)


def read_statistics(folder: Path) -> Statistics:
    """Return what statistics.json of `folder` says, or nothing where there is none of a corpus."""
    try:
        statistics = json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return statistics if isinstance(statistics, dict) and "settings" in statistics else {}


def write_statistics(folder: Path, statistics: Statistics) -> None:
    """Write statistics.json of `folder`, at once or not at all."""
    write_whole(folder / STATISTICS, [json.dumps(statistics, indent=2, ensure_ascii=False) + "\n"])


def _build(
    place: Path,
    settings: Statistics,
    languages: Languages,
    workers: int,
    source: Source,
    normalization: str,
    partial: Path,
) -> None:
    """Make in `partial` the parts that neither it nor `place`, which is moved there, has."""
    if place.exists():  # empty, or a corpus of these settings that lost a part
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(place, partial)

    def missing(*names: str) -> bool:
        return not all((partial / name).exists() for name in names)

    is_of_others = not read_statistics(partial) or any(_differing(partial, settings))
    if is_of_others or missing(*text_files(languages)):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_text(partial, settings, languages, source)
    if missing(MODEL, VOCABULARY):
        train_sentencepiece(partial, languages, settings["vocab_size"], normalization)
    scratch = partial / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    if missing(BINARIZED):
        scratch.mkdir()
        pieces = binarize(partial, languages, workers, scratch)
        write_statistics(partial, {**read_statistics(partial), "pieces": pieces})
        os.replace(scratch / BINARIZED, partial / BINARIZED)
        shutil.rmtree(scratch)


def _write_text(folder: Path, settings: Statistics, languages: Languages, source: Source) -> None:
    rules = Rules()
    splits, about = source(rules)
    if "held_out" in settings:
        _check_held_out(splits, *settings["held_out"])
    texts = {
        name: {language: [pair[number] for pair in pairs] for number, language in enumerate(languages)}
        for name, pairs in splits.items()
    }
    for name, of_languages in texts.items():
        for language, lines in of_languages.items():
            write_whole(folder / f"{name}.{language}", (line + "\n" for line in lines))
    statistics = {
        **about,
        "settings": settings,
        "rules": rules.table,
        "pairs": {name: len(pairs) for name, pairs in splits.items()},
        "words": {
            name: {name_of(language): _word_counts(lines) for language, lines in of_languages.items()}
            for name, of_languages in texts.items()
        },
        "share of runs of words that stand in training": {
            name: {
                name_of(language): known_runs(lines, texts["train"][language])
                for language, lines in texts[name].items()
            }
            for name in SPLITS[1:]
        },
    }
    write_statistics(folder, statistics)


def _check_held_out(splits: Splits, valid: int, test: int) -> None:
    """Raise PreparationError where a set is smaller than asked for, or nothing is left to train."""
    if len(splits["valid"]) < valid or len(splits["test"]) < test or not splits["train"]:
        found = ", ".join(f"{len(splits[name])} for {name}" for name in SPLITS)
        raise PreparationError(
            f"--held-out {valid} {test}: there are not so many sentences beside those to train on "
            f"({found}); choose fewer."
        )


def _word_counts(texts: list[str]) -> dict[str, int]:
    found = [word for text in texts for word in words(text)]
    return {"all": len(found), "distinct": len(set(found))}


def _print_summary(statistics: Statistics) -> None:
    print(f"corpus: {statistics['corpus']}")
    rules = [(row["rule"], row["kept"], row["dropped"]) for row in statistics["rules"]]
    if rules:
        _print_table(("rule", "kept", "dropped"), rules)
    sides = statistics["words"]["train"]
    columns = [f"{kind}{side.capitalize()} words" for side in sides for kind in ("", "distinct ")]
    rows = [
        (name, pairs, *(n for side in statistics["words"][name].values() for n in side.values()))
        for name, pairs in statistics["pairs"].items()
    ]
    _print_table(("split", "pairs", *columns), rows)
    print("How much of the held-out sets is known from training, in runs of 1 word to 4:")
    known = statistics["share of runs of words that stand in training"]
    rows = [
        (f"{name}, {side.capitalize()}", *(f"{share:.1%}" for share in shares))
        for name, sides in known.items()
        for side, shares in sides.items()
    ]
    _print_table(("known in training", *map(str, range(1, LONGEST_RUN + 1))), rows)
    if "note" in statistics:
        print(statistics["note"])


def _print_table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print the rows below their head, the first column to the left and the others to the right."""
    lines = [tuple(map(str, line)) for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    print()
