"""Searches rho for SAM and ASAM on held-out training images, over the grid of the paper's Section 5.2.

python -m recipes.image_classification.rho_search [--digits] [--data ROOT] [--jobs 2] [--dry-run]
"""

from __future__ import annotations

import argparse

from recipes.image_classification.grid import COLUMNS, DIGITS, add_options, parsed, results_of
from recipes.image_classification.table import as_markdown, dataset_of, described, draw_sweep, summary, write
from recipes.reporter import best_rho

#: The paper's grid, 0.00005 to 2.0, and the part of it that decides with --digits.
RHOS = [digit * 10.0**power for power in range(-5, 1) for digit in (1, 2, 5)][2:-1]
DIGITS_RHOS = {"SAM": [0.02, 0.05, 0.1, 0.2], "ASAM": [0.2, 0.5, 1.0, 2.0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Search rho for SAM and ASAM on held-out training images.")
    add_options(parser, "rho_search", seeds=2)
    args = parsed(parser)
    cells = {}
    for column in ("SAM", "ASAM"):
        optimizer = COLUMNS[column]
        if args.digits:
            setting = {**DIGITS[optimizer], "hold_out": 300}
        else:
            setting = {"dataset": "cifar10", "model": "wrn16_8", "hold_out": 5000}
        for rho in DIGITS_RHOS[column] if args.digits else RHOS:
            cells[f"{rho:g}", column] = {**setting, "optimizer": optimizer, "rho": rho}
    results = results_of(cells, args)
    summaries = {cell: summary(of_cell) for cell, of_cell in results.items()}
    best = []
    for column in ("SAM", "ASAM"):
        means = {float(rho): cell["mean"] for (rho, of), cell in summaries.items() if of == column}
        best.append(f"best for {column}: rho = {best_rho(means):g}")
    note = f"Accuracy on training images held out: {'; '.join(best)}.\n\n{described(results)}"
    title = f"Search for $\\rho$ on held-out images of {dataset_of(results)}"
    figure = draw_sweep(summaries, title, "maximum accuracy (%)")
    write(args.out, args.name, as_markdown("rho", summaries, note=note), figure, note=note, cells=summaries)


if __name__ == "__main__":
    main()
