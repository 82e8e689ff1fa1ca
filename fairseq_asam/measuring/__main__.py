"""Sharpness and adaptive sharpness of a fairseq checkpoint, as a table and JSON.

    python -m fairseq_asam.measuring DATA --path CHECKPOINT --rho 0.05 0.1 0.2

DATA is a folder of fairseq-preprocess. The loss is that of the checkpoint's own criterion without dropout, in
nats per target token, over the whole split unless --batches asks for fewer. --help lists the rest.
"""

from __future__ import annotations

import argparse
import math
import sys

from .command_line import add_batch_arguments, add_region_arguments, measure_watched, regions_of, report
from .fairseq_checkpoints import DatasetLoss, load


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_asam.measuring",
        description="Measure sharpness (Equation 2) and adaptive sharpness (Equation 4) of a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_arguments(parser)
    parser.add_argument("--path", required=True, metavar="CHECKPOINT", help="the fairseq checkpoint")
    add_region_arguments(parser)
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        sys.exit(f"{parser.prog.split('.')[-1]}: {error}.")


def add_data_arguments(parser: argparse.ArgumentParser, batches: int | None = None) -> None:
    """Add what says which loss is meant; *batches* is the default of --batches."""
    parser.add_argument("data", metavar="DATA", help="folder of fairseq-preprocess")
    parser.add_argument("--gen-subset", default="valid", metavar="SPLIT", help="the split to measure on")
    parser.add_argument("--max-tokens", type=int, help="size of a batch; none: as in training's validation")
    parser.add_argument("--user-dir", help="folder of a task, model or criterion that is not fairseq's own")
    add_batch_arguments(parser, batches)


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the JSON."""
    regions = regions_of(args)
    checkpoint = load(args.path, args.data, args.user_dir, args.cpu)
    loss = DatasetLoss(checkpoint, args.gen_subset, args.max_tokens, args.batches, args.seed)
    measured = measure_watched(loss, len(loss.batches), checkpoint.model, regions, args)
    sentences = sum(map(len, loss.batches))
    print(f"{args.path}: {args.gen_subset}, {sentences} sentences in {len(loss.batches)} batches")
    if loss.skipped:
        print(f"{loss.skipped} sentences are too long for the model and left out")
    if 0 < math.log(loss.words or 1) < measured[0].loss:
        print(f"guessing among {loss.words} words is better: is '{args.data}' the data set of its training?")
    counts = {"sentences": sentences, "skipped": loss.skipped, "batches": len(loss.batches)}
    report(args, measured, "token", counts)


if __name__ == "__main__":
    main()
