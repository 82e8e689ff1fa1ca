"""What the commands that measure sharpness share: options, progress bar, table and JSON.

It serves fairseq checkpoints and :mod:`fairseq_asam.vision`, and imports neither fairseq nor torchvision.
"""

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


#: The arguments of ``add_argument`` for each option.
OPTIONS: dict[str, dict[str, Any]] = {
    "--gen-subset": {"default": "valid", "metavar": "SPLIT", "help": "split to measure on"},
    "--max-tokens": {
        "type": int,
        "help": "most tokens in a batch (default: as in the validation of training)",
    },
    "--user-dir": {"help": "folder of a task, model or criterion that fairseq does not have"},
    "--batches": {"type": int, "help": "number of batches, drawn at random (default: the whole split)"},
    "--seed": {"type": int, "default": 1, "help": "decides random batches and points"},
    "--cpu": {"action": "store_true", "help": "use no GPU"},
    "--rho": {"type": float, "nargs": "+", "default": [0.05, 0.1, 0.2, 0.5], "help": "radii of the regions"},
    "--p-norm": {"type": float, "nargs": "+", "default": [2.0], "help": "norms that bound the regions"},
    "--normalization": {
        "choices": [name for name, operator in NORMALIZATIONS.items() if operator is not IDENTITY],
        "default": "element-wise",
        "help": "normalization operator T_w of adaptive sharpness",
    },
    "--eta": {"type": float, "default": 0.01, "help": "stability term of the normalization operator"},
    "--normalize-bias": {"action": "store_true", "help": "normalize biases too"},
    "--steps": {
        "type": int,
        "default": 1,
        "help": "steps of an ascent; 1: the epsilon of training, more: projected ascent",
    },
    "--restarts": {"type": int, "default": 1, "help": "number of ascents, the first from w"},
    "--json": {"type": Path, "metavar": "FILE", "help": "write the figures to FILE too"},
}
OF_CHECKPOINTS = ("--gen-subset", "--max-tokens", "--user-dir")
OF_BATCHES = ("--batches", "--seed", "--cpu")
OF_REGIONS = tuple(option for option in OPTIONS if option not in OF_CHECKPOINTS + OF_BATCHES)


def add_shared_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the options *names* of :data:`OPTIONS` to *parser*."""
    for name in names:
        help, default = OPTIONS[name]["help"], OPTIONS[name].get("default")
        if default is not None:
            help += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
        parser.add_argument(name, **{**OPTIONS[name], "help": help})


def regions_of(args: argparse.Namespace) -> list[Region]:
    """Return two regions for each p and rho: that of sharpness, then that of adaptive sharpness.

    Raises:
        ValueError: a value is out of its range (also of --steps and --restarts), or --json is a folder.
    """
    if args.json and args.json.is_dir():
        raise ValueError(f"'{args.json}' is a folder: give --json the name of a file")
    adaptive = {name: getattr(args, name) for name in ("eta", "normalization", "normalize_bias")}
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
    """Call :func:`~fairseq_asam.measure` with *loss*, a mean over *batches* batches, and a progress bar."""
    passes = 1 + len(regions) * (args.restarts * (args.steps + 1) - 1 if args.steps > 1 else 1)
    bar = tqdm(total=passes * batches, unit="batch", desc="sharpness", disable=None)
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's announcements; losses that are not finite are counted
        return measure(watched(loss, bar), model, regions, args.steps, args.restarts, args.seed)


def watched(loss: BatchLoss, bar: tqdm) -> BatchLoss:
    """Return *loss* such that each batch of it moves *bar* by one."""

    def terms() -> Iterator[tuple[Tensor, float]]:
        for term in loss():
            yield term
            bar.update()

    return terms


def report(args: argparse.Namespace, measured: list[Sharpness], unit: str, facts: dict[str, Any]) -> None:
    """Print the loss, in nats per *unit*, and a table of the sharpness *measured* in :func:`regions_of`.
    With --json, write them to a file, with *args* and *facts*."""
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
    """Return the figures for one rho and p, for JSON. ``None`` says that no loss was finite."""
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
