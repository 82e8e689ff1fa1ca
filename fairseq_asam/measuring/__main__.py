"""Sharpness and adaptive sharpness of a fairseq checkpoint, as a table and JSON.

    python -m fairseq_asam.measuring DATA --path CHECKPOINT --rho 0.05 0.1 0.2

DATA is a folder that fairseq-preprocess wrote. The loss is that of the checkpoint's own criterion, without
dropout, in nats per target token. It is a mean over the whole split unless --batches asks for fewer batches.
"""

from __future__ import annotations

import argparse
import math
import sys

from . import command_line
from .fairseq_checkpoints import DatasetLoss, load


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_asam.measuring",
        description="Measure sharpness (Equation 2) and adaptive sharpness (Equation 4) of a checkpoint.",
    )
    parser.add_argument("data", metavar="DATA", help="folder that fairseq-preprocess wrote")
    command_line.add_shared_options(parser, *command_line.OF_CHECKPOINTS, *command_line.OF_BATCHES)
    parser.add_argument("--path", required=True, metavar="CHECKPOINT", help="fairseq checkpoint")
    command_line.add_shared_options(parser, *command_line.OF_REGIONS)
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"measuring: {error}.")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the JSON."""
    regions = command_line.regions_of(args)
    checkpoint = load(args.path, args.data, args.user_dir, args.cpu)
    loss = DatasetLoss(checkpoint, args.gen_subset, args.max_tokens, args.batches, args.seed)
    measured = command_line.measure_watched(loss, len(loss.batches), checkpoint.model, regions, args)
    sentences = sum(map(len, loss.batches))
    print(f"{args.path}: {args.gen_subset}, {sentences} sentences in {len(loss.batches)} batches")
    if loss.skipped:
        print(f"{loss.skipped} sentences are too long for the model and left out")
    if 0 < math.log(loss.words or 1) < measured[0].loss:
        print(f"guessing among {loss.words} words is better: is '{args.data}' the data set of its training?")
    counts = {"sentences": sentences, "skipped": loss.skipped, "batches": len(loss.batches)}
    command_line.report(args, measured, "token", counts)


if __name__ == "__main__":
    main()
