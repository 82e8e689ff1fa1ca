"""Sharpness and adaptive sharpness of a fairseq checkpoint, as a table and JSON.

    python -m fairseq_asam.analysis.sharpness DATA --path CHECKPOINT --rho 0.05 0.1 0.2

DATA is a folder of fairseq-preprocess. The loss is that of the checkpoint's own criterion without dropout, in
nats per target token, over the whole split unless --batches asks for fewer. --help lists the rest.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_asam import NORMALIZATIONS, Region, Sharpness, measure

from .checkpoints import DatasetLoss, load
from .output import write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_asam.analysis.sharpness",
        description="Measure sharpness (Equation 2) and adaptive sharpness (Equation 4) of a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_arguments(parser)
    parser.add_argument("--path", required=True, metavar="CHECKPOINT", help="the fairseq checkpoint")
    parser.add_argument(
        "--rho", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5], help="radii of the regions"
    )
    parser.add_argument("--p-norm", type=float, nargs="+", default=[2.0], help="orders of the norm, 2 or inf")
    parser.add_argument(
        "--normalization", choices=NORMALIZATIONS[1:], default="element-wise", help="of adaptive sharpness"
    )
    parser.add_argument("--eta", type=float, default=0.01, help="stability term of the normalization")
    parser.add_argument("--normalize-bias", action="store_true", help="normalize biases too")
    parser.add_argument(
        "--steps", type=int, default=1, help="1: the epsilon of training; more: projected gradient ascent"
    )
    parser.add_argument("--restarts", type=int, default=1, help="ascents, the first from w")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        sys.exit(f"{parser.prog.split('.')[-1]}: {error}.")


def add_data_arguments(parser: argparse.ArgumentParser, batches: int | None = None) -> None:
    """Add what says which loss is meant; *batches* is the default of --batches."""
    parser.add_argument("data", metavar="DATA", help="folder of fairseq-preprocess")
    parser.add_argument("--gen-subset", default="valid", metavar="SPLIT", help="the split to measure on")
    parser.add_argument("--batches", type=int, default=batches, help="random batches; none: the whole split")
    parser.add_argument("--max-tokens", type=int, help="size of a batch; none: as in training's validation")
    parser.add_argument("--seed", type=int, default=1, help="of random batches, points and directions")
    parser.add_argument("--user-dir", help="folder of a task, model or criterion that is not fairseq's own")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the JSON."""
    adaptive = {
        "eta": args.eta,
        "normalization": args.normalization,
        "normalize_bias": args.normalize_bias,
    }
    pairs = [
        (Region(rho, p=p, normalization="none"), Region(rho, p=p, **adaptive))
        for p in args.p_norm
        for rho in args.rho
    ]
    regions = [region for pair in pairs for region in pair]
    checkpoint = load(args.path, args.data, args.user_dir, args.cpu)
    loss = DatasetLoss(checkpoint, args.gen_subset, args.max_tokens, args.batches, args.seed)
    passes = 1 + len(regions) * (args.restarts * (args.steps + 1) - 1 if args.steps > 1 else 1)
    warnings.simplefilter("ignore")  # torch's of what will change; what is not finite is counted
    with tqdm(total=passes * len(loss.batches), unit="batch", desc="sharpness", disable=None) as bar:
        measured = measure(loss.watched(bar), checkpoint.model, regions, args.steps, args.restarts, args.seed)
    rows = [row(*found) for found in zip(measured[::2], measured[1::2])]
    sentences = sum(map(len, loss.batches))
    ascent = "one ascent step" if args.steps == 1 else f"{args.steps} ascent steps, {args.restarts} restarts"
    print(f"{args.path}: {args.gen_subset}, {sentences} sentences in {len(loss.batches)} batches")
    if loss.skipped:
        print(f"{loss.skipped} sentences are too long for the model and left out")
    if 0 < math.log(loss.words or 1) < measured[0].loss:
        print(f"guessing among {loss.words} words is better: is '{args.data}' the data set of its training?")
    print(f"loss {measured[0].loss:.4f} nats per token; {ascent}, {args.normalization}, eta {args.eta:g}\n")
    print("\n".join(table(rows)))
    if args.json:
        settings = {
            name: value for name, value in vars(args).items() if name not in ("json", "rho", "p_norm")
        }
        counts = {"sentences": sentences, "skipped": loss.skipped, "batches": len(loss.batches)}
        write_json(args.json, {**settings, **counts, "loss": measured[0].loss, "regions": rows})


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


if __name__ == "__main__":
    main()
