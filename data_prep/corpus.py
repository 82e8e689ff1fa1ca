"""The corpus folder: raw text, a joint sentencepiece model, embeddings, fairseq's binarized form, statistics.

A folder is built beside its destination, as `.NAME.partial`, and renamed when it is whole. What an
interrupted run finished there, the next run with the same settings takes up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep import PreparationError
from data_prep.pairs import Pair, Rules
from data_prep.parts import (
    BINARIZED,
    EMBEDDINGS,
    MODEL,
    PHRASES,
    SIDES,
    SPLITS,
    TEXTS,
    VOCABULARY,
    binarize,
    make_embeddings,
    train_sentencepiece,
    write_whole,
)
from data_prep.split import one_word_neighbours, split, without_rare_phrases

STATISTICS = "statistics.json"
SMALLEST_VOCABULARY = 100

Statistics = dict[str, Any]
Source = Callable[[Rules], "tuple[list[Pair], Statistics]"]


def add_arguments(parser: argparse.ArgumentParser, vocabulary: int, held_out: int) -> None:
    """The arguments that every corpus has, with the defaults that suit this one."""
    parser.add_argument("destination", metavar="DEST", type=Path, help="folder to make")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=vocabulary,
        metavar="N",
        help="sentencepiece pieces, shared by both languages; a corpus too small for N gets fewer "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--embed-dim",
        type=int,
        default=128,
        metavar="N",
        help="numbers in an embedding, for fairseq's --encoder-embed-path and --decoder-embed-path "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=held_out,
        metavar="N",
        help="sentences in the validation set, and as many in the test set (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="which sentences are held out (default: %(default)s)"
    )
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes at a time (default: all %(default)s cores)",
    )


def run(main: Callable[[], None]) -> None:
    """Calls `main`; what stops it becomes one sentence on stderr and an exit status that isn't 0."""
    try:
        main()
    except PreparationError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to go on.")


def prepare(arguments: argparse.Namespace, source: Source) -> None:
    """Makes the corpus folder, or what is missing of it, and prints the table of counts.

    `source` gives the clean pairs and what statistics.json is to say about them; it is called only
    where the text isn't there yet. All `arguments` but the workers tell one corpus from another.

    Raises PreparationError where an argument is out of range, the destination can't be written or holds
    something else, or the pairs are too few.
    """
    if arguments.vocab_size < SMALLEST_VOCABULARY:
        raise PreparationError(
            f"--vocab-size {arguments.vocab_size}: must be at least {SMALLEST_VOCABULARY}, "
            "for letters and marks alone take most of that."
        )
    for name in ("held_out", "embed_dim", "workers"):
        if getattr(arguments, name) < 1:
            option = "--" + name.replace("_", "-")
            raise PreparationError(f"{option} {getattr(arguments, name)}: must be at least 1.")
    destination = arguments.destination
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("destination", "workers")
    }
    with writing(destination, megabytes=200):
        if is_whole(destination, settings, (*TEXTS, *PHRASES, MODEL, VOCABULARY, *EMBEDDINGS, BINARIZED)):
            print(f"{destination} is complete: nothing to do.")
        else:
            _build(destination, settings, arguments.workers, source)
    _print_summary(read_statistics(destination))


@contextlib.contextmanager
def writing(destination: Path, megabytes: int) -> Iterator[None]:
    """Turns an OSError into a PreparationError that says what `destination` must be like."""
    try:
        yield
    except OSError as error:
        raise PreparationError(
            f"{destination}: cannot be written ({error.strerror}: {error.filename}); "
            f"choose a folder that you may write to, with {megabytes} MB free."
        ) from None


def is_whole(folder: Path, settings: Statistics, parts: tuple[str, ...]) -> bool:
    """True where `folder` has all `parts`; raises PreparationError where it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    statistics = read_statistics(folder)
    if not statistics:
        raise PreparationError(f"{folder}: exists and is no corpus made here; name a new folder.")
    for name, value in settings.items():
        if statistics["settings"].get(name) != value:
            raise PreparationError(
                f"{folder}: was prepared with {name} {statistics['settings'].get(name)}, not {value}; "
                "name another folder, or remove this one."
            )
    return all((folder / part).exists() for part in parts)


def read_statistics(folder: Path) -> Statistics:
    try:
        return json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def write_statistics(folder: Path, statistics: Statistics) -> None:
    write_whole(folder / STATISTICS, [json.dumps(statistics, indent=2, ensure_ascii=False) + "\n"])


def _build(destination: Path, settings: Statistics, workers: int, source: Source) -> None:
    """Makes the parts that are missing, in a folder beside `destination` that takes its name at the end."""
    partial = destination.with_name(f".{destination.name}.partial")
    if destination.exists():  # empty, or a corpus of these settings that lost a part
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(destination, partial)

    def missing(*names: str) -> bool:
        return not all((partial / name).exists() for name in names)

    if read_statistics(partial).get("settings") != settings or missing(*TEXTS, *PHRASES):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_text(partial, settings, source)
    if missing(MODEL, VOCABULARY):
        train_sentencepiece(partial, settings["vocab_size"])
    if missing(*EMBEDDINGS):
        make_embeddings(partial, settings["embed_dim"])
    if missing(BINARIZED):
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            pieces = binarize(partial, workers, Path(scratch))
            write_statistics(partial, {**read_statistics(partial), "pieces": pieces})
            os.replace(Path(scratch, BINARIZED), partial / BINARIZED)
    os.replace(partial, destination)


def _write_text(folder: Path, settings: Statistics, source: Source) -> None:
    rules = Rules()
    pairs, about = source(rules)
    held_out = settings["held_out"]
    splits = split(pairs, rules, held_out, settings["seed"])
    if min(len(splits["test"]), len(splits["valid"])) < held_out or not splits["train"]:
        sentences = sum(map(Pair.is_sentence, pairs))
        raise PreparationError(
            f"--held-out {held_out}: two such sets and a training set can't be had from "
            f"{sentences} sentences; choose fewer."
        )
    training = without_rare_phrases(splits["train"], rules)
    training_sentences = list(filter(Pair.is_sentence, training))
    splits["phrases"] = [pair for pair in training if not pair.is_sentence()]
    splits["train"] = training if settings["train_on_phrases"] else training_sentences
    for name, pairs in splits.items():
        for language, side in SIDES.items():
            write_whole(folder / f"{name}.{language}", (getattr(pair, side) + "\n" for pair in pairs))
    statistics = {
        **about,
        "settings": settings,
        "rules": rules.table,
        "pairs": {name: len(pairs) for name, pairs in splits.items()},
        "training sentences": len(training_sentences),
        "held-out sentences one word from a training sentence": {
            name: {
                side: one_word_neighbours(
                    (getattr(pair, side) for pair in splits[name]),
                    (getattr(pair, side) for pair in training_sentences),
                )
                for side in SIDES.values()
            }
            for name in SPLITS[1:]
        },
    }
    write_statistics(folder, statistics)


def _print_summary(statistics: Statistics) -> None:
    width = max(len(row["rule"]) for row in statistics["rules"])
    print(f"{'rule':{width}}  {'kept':>8}  {'dropped':>8}")
    for row in statistics["rules"]:
        print(f"{row['rule']:{width}}  {row['kept']:>8}  {row['dropped']:>8}")
    print(", ".join(f"{name}: {count} pairs" for name, count in statistics["pairs"].items()))
    if "note" in statistics:
        print(statistics["note"])
