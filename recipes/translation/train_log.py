"""Reads the log that `fairseq-train --log-format json` writes."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Enough for the last lines of each kind.
PROGRESS_BYTES = 10_000


def parse(line: str) -> tuple[str, dict[str, float]] | None:
    """Return the tag ("train_inner", "train" or "valid") and the figures of a line, None for any other line.

    Losses and sharpness are in bits per target token, as fairseq prints them.
    """
    fields = line.rstrip().split(" | ", 3)
    if len(fields) < 4 or not fields[3].startswith("{"):
        return None
    try:
        return fields[2], {name: float(value) for name, value in json.loads(fields[3]).items()}
    except ValueError:
        return None


def read_epochs(path: Path) -> list[dict[str, float]]:
    """Return the figures of each epoch that was trained and validated, in order, under fairseq's names.

    Among them are `valid_loss`, `train_loss`, and `train_train_wall`, the seconds spent in training steps;
    with asam and sam also `train_sharpness`. An epoch that was interrupted and trained again counts once,
    with its last figures. fairseq logs those of the training after it has written the checkpoint: an epoch
    that was interrupted in between isn't trained again, and has only those of the validation.
    """
    epochs: dict[float, dict[str, float]] = {}
    for tag, figures in _records(path):
        if tag in ("train", "valid"):
            epochs.setdefault(figures["epoch"], {}).update(figures)
    return [epochs[number] for number in sorted(epochs) if "valid_loss" in epochs[number]]


def read_intervals(path: Path) -> list[dict[str, float]]:
    """Return the figures of each logging interval of the training, in order, under fairseq's names.

    Among them are `update`, the number of epochs since the start with its fraction, and `loss`; with asam and
    sam also `sharpness`. An interval that was trained again counts once, with its last figures.
    """
    intervals = {figures["update"]: figures for tag, figures in _records(path) if tag == "train_inner"}
    return [intervals[update] for update in sorted(intervals)]


def training_seconds(paths: Iterable[Path]) -> float:
    """Return the seconds in training steps, in each epoch those of the fastest of several equal trainings.

    Other work on the machine can only slow an epoch. fairseq rounds its seconds. An epoch whose figures an
    interruption kept out of every log counts as the mean of the others.
    """
    fastest: dict[float, float] = {}
    for figures in itertools.chain.from_iterable(map(read_epochs, paths)):
        seconds = figures.get("train_train_wall", math.inf)
        fastest[figures["epoch"]] = min(seconds, fastest.get(figures["epoch"], seconds))
    known = [seconds for seconds in fastest.values() if seconds < math.inf]
    return sum(known) * len(fastest) / len(known)


def _records(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    with open(path, encoding="utf-8") as log:
        yield from filter(None, map(parse, log))


def read_progress(path: Path) -> tuple[float, dict[str, float]]:
    """Return the number of epochs trained, with its fraction, and the last figures, under fairseq's names."""
    with open(path, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - PROGRESS_BYTES))
        tail = log.read().decode("utf-8", "replace").splitlines()
    epochs, last = 0.0, {}
    for tag, figures in filter(None, map(parse, tail)):
        last.update(figures)
        if tag != "valid":
            epochs = figures["update"] if tag == "train_inner" else figures["epoch"]
    return epochs, last
