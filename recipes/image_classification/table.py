"""Tables and figures of finished runs: mean and standard deviation over seeds, beside the paper's numbers."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from fairseq_asam.files import write_json
from fairseq_asam.vision.data import DATASETS
from recipes.image_classification.grid import COLUMNS, Results
from recipes.reporter import format_number, markdown_table, mean_and_sd, write_figure, write_text

#: (row, column) -> figures of a cell, as :func:`summary` returns them.
Summaries = dict[tuple[str, str], dict[str, Any]]
# The axis of a sweep begins at most so many percent below the median. Bad runs would squeeze the others.
SHOWN_BELOW = 5.0
# A run has failed if its accuracy never exceeds so many times that of chance.
CHANCES = 2


def summary(results: list[dict[str, Any]], metric: str = "test_accuracy") -> dict[str, Any]:
    """Return the figures of a cell from the results of its runs.

    As in the paper, a run counts with the maximum of *metric* over its epochs. A run has failed if its loss
    ceased to be finite or its accuracy never left that of chance (in Table 2, "10% of accuracy").

    Returns:
        ``mean`` and ``std`` (sample standard deviation) over the runs that did not fail, in percent, ``None``
        where there are too few; their ``maxima``; the number of ``runs`` and of those that ``failed``.
    """
    chance = 1 / DATASETS[results[0]["options"]["dataset"]].num_classes
    maxima = [
        max(epoch[metric] or 0.0 for epoch in result["epochs"])
        for result in results
        if not result["diverged"]
        and max(epoch["test_accuracy"] or 0.0 for epoch in result["epochs"]) > CHANCES * chance
    ]
    percent = [100 * value for value in maxima]
    mean, std = mean_and_sd(percent)
    return {
        "mean": mean,
        "std": std,
        "maxima": percent,
        "runs": len(results),
        "failed": len(results) - len(percent),
    }


def text_of(cell: dict[str, Any] | None) -> str:
    """Return a cell's mean and standard deviation, and how many of its runs failed."""
    if cell is None:
        return ""
    if cell["mean"] is None:
        return "all failed"
    failed = f" ({cell['failed']} of {cell['runs']} failed)" if cell["failed"] else ""
    return format_number(cell["mean"], cell["std"]) + failed


def as_markdown(
    corner: str, cells: Summaries, paper: dict[str, tuple[str, ...]] | None = None, note: str = ""
) -> str:
    """Return a table of *cells*. On its right stand the paper's numbers, in the order of the columns."""
    rows, columns = (list(dict.fromkeys(labels)) for labels in zip(*cells))
    header = [corner, *columns, *(f"{column}, paper" for column in columns if paper)]
    body = [
        [row, *(text_of(cells.get((row, column))) for column in columns), *(paper or {}).get(row, ())]
        for row in rows
    ]
    return f"{markdown_table(header, body)}\n{note}\n"


def dataset_of(results: Results) -> str:
    """Return the name of the data set of a table's runs."""
    return next(iter(results.values()))[0]["options"]["dataset"]


def described(results: Results) -> str:
    """Return in words what the runs of a table have in common and how they were made."""
    runs = [result for of_cell in results.values() for result in of_cell]
    options = [run["options"] for run in runs]

    def values(name: str, optimizer: str | None = None) -> str:
        of = [each[name] for each in options if optimizer in (None, each["optimizer"])]
        return ", ".join(map(str, dict.fromkeys(of)))

    each = [optimizer for optimizer in COLUMNS.values() if values("epochs", optimizer)]
    epochs = ", ".join(f"{values('epochs', optimizer)} with {optimizer}" for optimizer in each)
    seconds = sum(run["seconds"] for run in runs)
    hardware = "; ".join(dict.fromkeys(run["hardware"] for run in runs))
    return (
        f"Percent; mean and sample standard deviation over the seeds {values('seed')} of the maximum over "
        f"the epochs. Data set {values('dataset')}, model {values('model')}, batches of "
        f"{values('batch_size')}, epochs: {epochs}. {len(runs)} runs took {seconds / 60:.0f} minutes "
        f"in all, on {hardware}."
    )


def draw(corner: str, cells: Summaries, paper: dict[str, tuple[str, ...]] | None = None) -> plt.Figure:
    """Draw means with standard deviations, a colour for each column. The paper's means are hollow."""
    rows, columns = (list(dict.fromkeys(labels)) for labels in zip(*cells))
    figure, axes = plt.subplots(figsize=(max(5, 1.2 * len(rows) + 2), 4), layout="constrained")
    for number, column in enumerate(columns):
        shift = 0.16 * (number - (len(columns) - 1) / 2)
        found = [(i + shift, cells[row, column]) for i, row in enumerate(rows) if cells[row, column]["mean"]]
        places = [place for place, _ in found]
        means, errors = ([cell[key] or 0 for _, cell in found] for key in ("mean", "std"))
        axes.errorbar(places, means, errors, fmt="o", capsize=3, color=f"C{number}", label=column)
        if paper:
            theirs = [float(paper[row][number].split()[0]) for row in rows]
            places = [i + shift for i in range(len(rows))]
            axes.plot(
                places, theirs, "D", markerfacecolor="none", color=f"C{number}", label=f"{column}, paper"
            )
    axes.set_xticks(range(len(rows)), rows, rotation=30 if max(map(len, rows)) > 8 else 0)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set(xlabel=corner, ylabel="maximum test accuracy (%)")
    axes.legend()
    return figure


def draw_sweep(cells: Summaries, title: str, ylabel: str) -> plt.Figure:
    """Draw means and standard deviations over rho, which the rows have, a line for each column."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for column in dict.fromkeys(column for _, column in cells):
        found = [(float(row), cell) for (row, col), cell in cells.items() if col == column and cell["mean"]]
        rhos, means, stds = zip(*sorted((rho, cell["mean"], cell["std"] or 0) for rho, cell in found))
        (line,) = axes.plot(rhos, means, "o-", markersize=4, label=column)
        low, high = ([min(m + sign * s, 100) for m, s in zip(means, stds)] for sign in (-1, 1))
        axes.fill_between(rhos, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="$\\rho$", ylabel=ylabel, xscale="log")
    means = [cell["mean"] for cell in cells.values() if cell["mean"]]
    if (floor := statistics.median(means) - SHOWN_BELOW) > min(means):
        axes.set_ylim(bottom=floor)
        axes.set_title(f"below {floor:.0f}%: see the table", loc="right", fontsize="small", color="grey")
    axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))
    ticks = sorted({float(row) for row, _ in cells})
    axes.set_xticks(ticks, [f"{rho:g}" for rho in ticks], rotation=45)
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def publish(
    args: argparse.Namespace,
    corner: str,
    summaries: Summaries,
    results: Results,
    paper: dict[str, tuple[str, ...]],
) -> None:
    """Write *summaries*, which are those of *results*, beside the paper's numbers."""
    note = described(results)
    if args.digits:
        note += " The paper's numbers are of its own networks and images: not to be compared."
    markdown = as_markdown(corner, summaries, paper, note)
    # Accuracies on other images do not belong on the same axis.
    figure = draw(corner, summaries, None if args.digits else paper)
    write(args.out, args.name, markdown, figure, note=note, cells=summaries, paper=paper)


def write(out: Path, name: str, markdown: str, figure: plt.Figure, **results: Any) -> None:
    """Write `<name>.md`, `.png` and, with *results*, `.json` into the folder *out*, and print the table."""
    results["cells"] = [{"row": row, "column": col, **cell} for (row, col), cell in results["cells"].items()]
    write_json(out / f"{name}.json", results)
    write_figure(out / f"{name}.png", figure)
    write_text(out / f"{name}.md", markdown)
    print(markdown, end="")
