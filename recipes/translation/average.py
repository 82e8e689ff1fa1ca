"""Averages the weights of the last epochs of a run into a checkpoint for score.py.

    python -m recipes.translation.average RUN OUT [--last 10]

RUN is a folder of train.py that kept these epochs (its flag `--keep-last-epochs 10`). OUT gets
checkpoint_best.pt: the checkpoint of the last epoch, with the mean of the weights of all, taken in float64.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import fairseq_asam.tasks  # noqa: F401  names the types in a fairseq checkpoint that torch may load
from fairseq_asam.files import whole
from recipes.options import at_least_1


def main() -> None:
    parser = argparse.ArgumentParser(description="Average the weights of the last epochs of a run.")
    parser.add_argument("run", type=Path, help="folder of train.py")
    parser.add_argument("out", type=Path, help="folder for checkpoint_best.pt")
    parser.add_argument("--last", type=at_least_1, default=10, help="how many epochs (default: 10)")
    args = parser.parse_args()
    kept = {
        int(name[1]): file
        for file in args.run.glob("*")
        if (name := re.fullmatch(r"checkpoint(\d+)\.pt", file.name))
    }
    if len(kept) < args.last:
        sys.exit(
            f"average.py: '{args.run}' has the checkpoints of {len(kept)} epochs, not of {args.last}: train "
            f"with --keep-last-epochs {args.last}, or average fewer with --last."
        )
    with whole(args.out / "checkpoint_best.pt") as file:
        torch.save(average([kept[epoch] for epoch in sorted(kept)[-args.last :]]), file)


def average(files: list[Path]) -> dict:
    """Return the last checkpoint of `files`, its floating-point weights replaced by the mean over all."""
    sums: dict[str, torch.Tensor] = {}
    for file in tqdm(files, desc="averaging", unit="checkpoint", disable=None):
        checkpoint = torch.load(file, map_location="cpu")
        for name, weight in checkpoint["model"].items():
            if weight.is_floating_point():
                sums[name] = sums.get(name, 0) + weight.double()
    for name, total in sums.items():
        checkpoint["model"][name] = (total / len(files)).to(checkpoint["model"][name].dtype)
    return checkpoint


if __name__ == "__main__":
    main()
