"""Draws the curves of several runs: loss, sharpness and, where training scored it, validation BLEU.

    python -m recipes.translation.curves OUT.png RUN RUN...

Runs whose folders have the same name but for `-seed-N` at the end make one curve, the mean over the seeds, in
a band from the lowest to the highest.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from recipes.reporter import write_figure
from recipes.translation.train_log import read_epochs, read_intervals

#: Opacity of the bands.
BAND = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of several runs.")
    parser.add_argument("out", type=Path, help="the PNG file to write")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of train.py")
    args = parser.parse_args()
    systems: dict[str, list[Path]] = {}
    for run in args.runs:
        if not (run / "log").exists():
            sys.exit(f"curves.py: '{run / 'log'}' is missing: run train.py for it first.")
        systems.setdefault(re.sub(r"-seed-\d+$", "", run.name), []).append(run)
    logs = {
        name if len(runs) > 1 else runs[0].name: [run / "log" for run in runs]
        for name, runs in systems.items()
    }
    write_figure(args.out, draw(logs))


def draw(logs: dict[str, Sequence[Path]]) -> Figure:
    """Return a figure of panels over epochs: for each name the mean of its logs, in a band of their range.

    The panels show the losses, the validation BLEU if all runs scored it (`--eval-bleu`), and the sharpness
    of the runs that measured it.
    """
    epochs_of = {name: [read_epochs(log) for log in of_seeds] for name, of_seeds in logs.items()}
    every = [epoch for runs in epochs_of.values() for epochs in runs for epoch in epochs]
    with_bleu = all("valid_bleu" in epoch for epoch in every)
    figure = Figure(figsize=(16 if with_bleu else 11, 4.5), layout="constrained")
    panels = figure.subplots(1, 3 if with_bleu else 2)
    losses, sharpness = panels[0], panels[-1]
    bleu = panels[1] if with_bleu else None
    figure.get_layout_engine().set(wspace=0.05)
    for number, (name, of_seeds) in enumerate(logs.items()):
        colour = f"C{number}"
        intervals = [read_intervals(log) for log in of_seeds]
        _plot(losses, intervals, "update", "loss", color=colour, linewidth=0.8, alpha=0.7)
        _plot(losses, epochs_of[name], "epoch", "valid_loss", color=colour, marker="o", markersize=4)
        if bleu is not None:
            _plot(bleu, epochs_of[name], "epoch", "valid_bleu", color=colour)
        if all("sharpness" in interval for run in intervals for interval in run):
            _plot(sharpness, intervals, "update", "sharpness", color=colour)
    losses.set(title="Loss", ylabel="label-smoothed loss (bits per token)")
    # Cut off the loss before the first validation: it would squeeze all that follows.
    losses.set_ylim(top=1.1 * max((epoch["valid_loss"] for epoch in every), default=0.0))
    sharpness.set(title="Sharpness $L(w+\\epsilon)-L(w)$ in training", ylabel="sharpness (bits per token)")
    sharpness.set_ylim(bottom=0)
    if bleu is not None:
        # What the first epochs score would squeeze the differences between the runs.
        best = max((epoch["valid_bleu"] for epoch in every), default=0.0)
        bleu.set(title="Validation BLEU in training", ylabel="BLEU", ylim=(best / 2, 1.05 * best))
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    seeds = max(map(len, logs.values()))
    figure.legend(
        handles=[
            *(Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(logs)),
            Line2D([], [], color="grey", marker="o", markersize=4, label="validation"),
            Line2D([], [], color="grey", linewidth=0.8, alpha=0.7, label="training"),
            *([Patch(color="grey", alpha=BAND, label=f"range over {seeds} seeds")] if seeds > 1 else []),
        ],
        loc="outside lower center",
        ncols=4,
    )
    return figure


def _plot(axes: Axes, runs: Sequence[Sequence[dict[str, float]]], x: str, y: str, **style: Any) -> None:
    """Plot the mean of *y* over *x* of several runs, as far as all have come, in a band of their range."""
    if not all(runs):
        return
    end = min(run[-1][x] for run in runs)
    at = [figures[x] for figures in runs[0] if figures[x] <= end]
    # Each seed has batches of its own, so that the updates of two seeds are not at the same places.
    values = [np.interp(at, [each[x] for each in run], [each[y] for each in run]) for run in runs]
    axes.plot(at, np.mean(values, axis=0), **style)
    if len(runs) > 1:
        lowest, highest = np.min(values, axis=0), np.max(values, axis=0)
        axes.fill_between(at, lowest, highest, color=style["color"], alpha=BAND, linewidth=0)


if __name__ == "__main__":
    main()
