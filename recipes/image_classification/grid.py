"""The runs of a table or figure: every cell of it with every seed."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.options import at_least_1
from recipes.runner import Run, complete, flags

#: (row, column) -> options of `python -m fairseq_asam.vision train`; the paper's are the defaults.
Cells = dict[tuple[str, str], dict[str, Any]]
#: (row, column) -> what `result.json` says of each run, in order of seeds.
Results = dict[tuple[str, str], list[dict[str, Any]]]

#: The columns of the paper's tables, and the optimizer of each.
COLUMNS = {"SGD": "sgd", "SAM": "sam", "ASAM": "asam"}

#: What --digits trains, in minutes on a CPU: other images, a small network and fewer epochs. They are enough
#: for SGD to fit every training image, wrong labels included. As in the paper, SGD has twice as many as the
#: others. The values of rho are the best of rho_search.py, on held-out training images.
SMALL = {"dataset": "digits", "model": "resnet8", "batch_size": 64, "augmentation": "none"}
DIGITS = {
    "sgd": {**SMALL, "epochs": 40},
    "sam": {**SMALL, "epochs": 20, "rho": 0.2},
    "asam": {**SMALL, "epochs": 20, "rho": 1.0},
}


def by_optimizer(rows: dict[str, dict[str, Any]], digits: bool) -> Cells:
    """Return the cells of a table: the options of each row with each optimizer, on *digits* if asked."""
    return {
        (row, column): {**options, **(DIGITS[optimizer] if digits else {}), "optimizer": optimizer}
        for row, options in rows.items()
        for column, optimizer in COLUMNS.items()
    }


def add_options(
    parser: argparse.ArgumentParser,
    name: str,
    seeds: int,
    rows: Sequence[str] = (),
    digits_rows: Sequence[str] = (),
) -> None:
    """Add the options of a table or figure to *parser*.

    Args:
        parser: Of the command; :func:`parsed` reads its command line.
        name: Of the results and of the folder of the runs; --digits adds `-digits` to it.
        seeds: How many runs each cell has, unless --seeds says otherwise.
        rows: The rows of the table. If there are several, --rows chooses some.
        digits_rows: The default of --rows with --digits.
    """
    parser.set_defaults(name=name, all_rows=rows, digits_rows=digits_rows, rows=None)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits and a small network")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set; not for digits")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR if it is missing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--seeds", type=at_least_1, default=seeds, help="runs of each cell (default: %(default)s)"
    )
    if len(rows) > 1:
        some = f"some of {', '.join(rows)}".replace("%", "%%")
        parser.add_argument("--rows", nargs="+", choices=rows, metavar="ROW", help=some)
    parser.add_argument(
        "--launcher",
        default=sys.executable,
        help="what starts a run, such as 'accelerate launch --num_processes 4' (default: Python)",
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: that of the runs)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return what the command line says, with the options of :func:`add_options` filled in."""
    args = parser.parse_args()
    args.rows = args.rows or (args.digits_rows if args.digits else args.all_rows)
    args.name = f"{args.name}-digits" if args.digits else args.name
    args.runs = Path("runs") / "image_classification" / args.name
    args.out = args.out or args.runs
    return args


def results_of(cells: Cells, args: argparse.Namespace) -> Results:
    """Make the runs that are not finished, and return the results of all.

    With --dry-run, print the commands instead and end the program.
    """
    seeds = range(1, args.seeds + 1)
    runs = {cell: [_run(cell, {**cells[cell], "seed": seed}, args) for seed in seeds] for cell in cells}
    every = [run for of_cell in runs.values() for run in of_cell]
    if args.dry_run:
        for run in every:
            print(shlex.join(run.commands[0]))
        sys.exit()
    complete(every, args.jobs)
    return {
        cell: [json.loads((run.folder / "result.json").read_text("utf-8")) for run in of_cell]
        for cell, of_cell in runs.items()
    }


def _run(cell: tuple[str, str], options: dict[str, Any], args: argparse.Namespace) -> Run:
    words = " ".join([*cell, f"seed {options['seed']}"]).lower()
    folder = args.runs / "-".join("".join(c if c.isalnum() or c in ".-" else " " for c in words).split())
    place = {"output": folder, "data": args.data, "download": args.download}
    train = ["-m", "fairseq_asam.vision", "train", *flags({**place, **options})]
    return Run(folder, options, [[*shlex.split(args.launcher), *train]])
