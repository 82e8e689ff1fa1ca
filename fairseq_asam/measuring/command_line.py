"""What the commands that measure sharpness, of fairseq checkpoints and of image runs, have in common: their
options, progress bar, table and JSON."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from fairseq_asam import NORMALIZATIONS, Region, Sharpness, measure
from fairseq_asam.files import write_json
from fairseq_asam.sharpness.measure import validate_ascents
from fairseq_asam.sharpness.normalization import IDENTITY

#: A loss that is a mean over batches.
BatchLoss = Callable[[], Iterable[tuple[Tensor, float]]]


def add_region_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which regions are searched, and how."""
    add = parser.add_argument
    add("--rho", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5], help="radii of the regions")
    add("--p-norm", type=float, nargs="+", default=[2.0], help="orders of the norm, 2 or inf")
    adaptive = [name for name, operator in NORMALIZATIONS.items() if operator is not IDENTITY]
    add("--normalization", choices=adaptive, default="element-wise", help="of adaptive sharpness")
    add("--eta", type=float, default=0.01, help="stability term of the normalization")
    add("--normalize-bias", action="store_true", help="normalize biases too")
    add("--steps", type=int, default=1, help="1: the epsilon of training; more: projected gradient ascent")
    add("--restarts", type=int, default=1, help="ascents, the first from w")
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE too")


def add_batch_arguments(parser: argparse.ArgumentParser, batches: int | None = None) -> None:
    """Add what says how much of the data is measured, and where; *batches* is the default of --batches."""
    add = parser.add_argument
    add("--batches", type=int, default=batches, help="random batches; none: the whole split")
    add("--seed", type=int, default=1, help="of random batches, points and directions")
    add("--cpu", action="store_true", help="leave a GPU alone")


def regions_of(args: argparse.Namespace) -> list[Region]:
    """Return the regions of sharpness and adaptive sharpness by turns, for each p and rho.

    Raises:
        ValueError: a value out of its range, also of --steps and --restarts; --json is a folder.
    """
    if args.json and args.json.is_dir():
        raise ValueError(f"'{args.json}' is a folder: give --json the name of a file")
    adaptive = {
        "eta": args.eta,
        "normalization": args.normalization,
        "normalize_bias": args.normalize_bias,
    }
    regions = [
        region
        for p in args.p_norm
        for rho in args.rho
        for region in (Region(rho, p=p, normalization="none"), Region(rho, p=p, **adaptive))
    ]
    validate_ascents(regions, args.steps, args.restarts)
    return regions


def measure_watched(
    loss: BatchLoss, batches: int, model: nn.Module, regions: list[Region], args: argparse.Namespace
) -> list[Sharpness]:
    """Return what :func:`~fairseq_asam.measure` does with the options in *args*, behind a progress bar.
    *loss* is a mean over so many *batches*."""
    passes = 1 + len(regions) * (args.restarts * (args.steps + 1) - 1 if args.steps > 1 else 1)
    bar = tqdm(total=passes * batches, unit="batch", desc="sharpness", disable=None)
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of what will change; what is not finite is counted
        return measure(watched(loss, bar), model, regions, args.steps, args.restarts, args.seed)


def watched(loss: BatchLoss, bar: tqdm) -> BatchLoss:
    """Return *loss*, which then moves *bar* by one for each batch."""

    def terms() -> Iterator[tuple[Tensor, float]]:
        for term in loss():
            yield term
            bar.update()

    return terms


def report(args: argparse.Namespace, measured: list[Sharpness], unit: str, facts: dict[str, Any]) -> None:
    """Print the loss, in nats per *unit*, and the table of what was *measured* in :func:`regions_of`; write
    them to --json, with *args* and *facts*."""
    loss = measured[0].loss
    rows = [row(*pair) for pair in zip(measured[::2], measured[1::2])]
    ascent = "one ascent step" if args.steps == 1 else f"{args.steps} ascent steps, {args.restarts} restarts"
    print(f"loss {loss:.4f} nats per {unit}; {ascent}, {args.normalization}, eta {args.eta:g}\n")
    print("\n".join(table(rows)))
    if args.json:
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name not in ("json", "rho", "p_norm")
        }
        write_json(args.json, {**settings, **facts, "loss": loss, "regions": rows})


def row(plain: Sharpness, adaptive: Sharpness) -> dict[str, Any]:
    """Return what was found with one rho and p as JSON knows it: ``None`` where no loss was finite."""
    return {
        "p": f"{plain.region.p:g}",
        "rho": plain.region.rho,
        "sharpness": plain.value if math.isfinite(plain.value) else None,
        "adaptive_sharpness": adaptive.value if math.isfinite(adaptive.value) else None,
        "non_finite": plain.non_finite + adaptive.non_finite,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of *rows*."""
    lines = ["| p | rho | sharpness | adaptive sharpness |", "|--:|--:|--:|--:|"]
    for row in rows:
        cells = [row["p"], f"{row['rho']:g}"]
        for value in (row["sharpness"], row["adaptive_sharpness"]):
            cells.append("not finite" if value is None else f"{value:.6f}")
        lines.append(f"| {' | '.join(cells)} |")
    non_finite = sum(row["non_finite"] for row in rows)
    if non_finite:
        lines += ["", f"{non_finite} of the points seen have a loss that is not finite, and do not count."]
    return lines
