"""Draws the curves of several runs: loss, sharpness and, where training scored it, validation BLEU.

python -m recipes.translation.curves OUT.png RUN RUN...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from recipes.reporter import write_figure
from recipes.translation.train_log import read_epochs, read_intervals


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of several runs.")
    parser.add_argument("out", type=Path, help="the PNG file to write")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of train.py")
    args = parser.parse_args()
    logs = {run.name: run / "log" for run in args.runs}
    for log in logs.values():
        if not log.exists():
            sys.exit(f"curves.py: '{log}' is missing: run train.py for it first.")
    write_figure(args.out, draw(logs))


def draw(logs: dict[str, Path]) -> Figure:
    """Return a figure of panels over epochs.

    They show the losses, the validation BLEU if all runs scored it (`--eval-bleu`), and the sharpness of the
    runs that measured it.
    """
    epochs_of = {name: read_epochs(log) for name, log in logs.items()}
    with_bleu = all("valid_bleu" in epoch for epochs in epochs_of.values() for epoch in epochs)
    figure = Figure(figsize=(16 if with_bleu else 11, 4.5), layout="constrained")
    panels = figure.subplots(1, 3 if with_bleu else 2)
    losses, sharpness = panels[0], panels[-1]
    bleu = panels[1] if with_bleu else None
    figure.get_layout_engine().set(wspace=0.05)
    highest = best = 0.0
    for number, (name, log) in enumerate(logs.items()):
        colour = f"C{number}"
        epochs, intervals = epochs_of[name], read_intervals(log)
        x = [interval["update"] for interval in intervals]
        losses.plot(x, [interval["loss"] for interval in intervals], color=colour, linewidth=0.8, alpha=0.7)
        valid = [epoch["valid_loss"] for epoch in epochs]
        losses.plot([epoch["epoch"] for epoch in epochs], valid, color=colour, marker="o", markersize=4)
        highest = max([highest, *valid])
        if bleu is not None:
            scores = [epoch["valid_bleu"] for epoch in epochs]
            bleu.plot([epoch["epoch"] for epoch in epochs], scores, color=colour)
            best = max([best, *scores])
        if all("sharpness" in interval for interval in intervals):
            sharpness.plot(x, [interval["sharpness"] for interval in intervals], color=colour, label=name)
    losses.set(title="Loss", ylabel="label-smoothed loss (bits per token)")
    # Cut off the loss before the first validation: it would squeeze all that follows.
    losses.set_ylim(top=1.1 * highest)
    sharpness.set(title="Sharpness $L(w+\\epsilon)-L(w)$ in training", ylabel="sharpness (bits per token)")
    sharpness.set_ylim(bottom=0)
    if bleu is not None:
        # What the first epochs score would squeeze the differences between the runs.
        bleu.set(title="Validation BLEU in training", ylabel="BLEU", ylim=(best / 2, 1.05 * best))
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(
        handles=[
            *(Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(logs)),
            Line2D([], [], color="grey", marker="o", markersize=4, label="validation"),
            Line2D([], [], color="grey", linewidth=0.8, alpha=0.7, label="training"),
        ],
        frameon=False,
    )
    sharpness.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
