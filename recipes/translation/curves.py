"""Draws the loss and sharpness curves of several runs.

python recipes/translation/curves.py OUT.png RUN RUN...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from files import whole
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from train_log import read_epochs


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the loss and sharpness curves of several runs.")
    parser.add_argument("out", type=Path, help="the PNG file to write")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of train.sh")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "train.log").exists():
            sys.exit(f"curves.py: '{run / 'train.log'}' is missing: run train.sh for it first.")

    figure = draw({run.name: read_epochs(run / "train.log") for run in args.runs})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with whole(args.out) as file:
        figure.savefig(file, format="png", dpi=150)


def draw(runs: dict[str, list[dict[str, float]]]) -> plt.Figure:
    """Return a figure of two panels: losses over epochs, and the sharpness of the runs that measured it."""
    figure, (losses, sharpness) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for number, (name, epochs) in enumerate(runs.items()):
        colour = f"C{number}"
        x = [epoch["epoch"] for epoch in epochs]
        losses.plot(x, [epoch["valid_loss"] for epoch in epochs], color=colour, marker=".")
        losses.plot(x, [epoch["train_loss"] for epoch in epochs], color=colour, linestyle="--", linewidth=1)
        if all("train_sharpness" in epoch for epoch in epochs):
            sharpness.plot(
                x, [epoch["train_sharpness"] for epoch in epochs], color=colour, marker=".", label=name
            )
    losses.set(title="Loss", ylabel="label-smoothed loss (bits per token)")
    sharpness.set(
        title="Sharpness $L(w+\\epsilon)-L(w)$ seen in training", ylabel="sharpness (bits per token)"
    )
    sharpness.set_ylim(bottom=0)
    for axes in (losses, sharpness):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(
        handles=[
            *(Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(runs)),
            Line2D([], [], color="grey", marker=".", label="validation"),
            Line2D([], [], color="grey", linestyle="--", linewidth=1, label="training (with dropout)"),
        ],
        frameon=False,
    )
    sharpness.legend(frameon=False)
    figure.get_layout_engine().set(wspace=0.05)
    return figure


if __name__ == "__main__":
    main()
