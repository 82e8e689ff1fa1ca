"""The options of train.py, their checks, and the text that they name."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from data_prep import generated
from recipes.language_model.transformer import HEAD
from recipes.options import at_least_1

# Normalization operator and default radius: the paper's for translation (Section 5.3).
REGIONS = {"sam": ("none", 0.1), "asam": ("element-wise", 0.2)}


def options(description: str) -> argparse.ArgumentParser:
    """Return the parser of train.py."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])

    def add(option: str, help: str, default: Any = None, **keywords: Any) -> None:
        help += " (default: %(default)s)" if default else ""
        parser.add_argument(option, help=help, default=default, **keywords)

    rho = ", ".join(f"{rho} for {optimizer}" for optimizer, (_, rho) in REGIONS.items())
    add("--optimizer", choices=["adam", *REGIONS], required=True, help="adam is AdamW")
    add("--rho", type=float, help=f"radius of the maximization region (default: {rho})")
    add("--data", nargs="+", default=[], metavar="FILE", help="text files (default: generated sentences)")
    add("--out", metavar="RUN", help="folder of the run (default: runs/language_model/OPTIMIZER)")
    add("--updates", type=at_least_1, default=300, metavar="N", help="updates in all")
    add("--save-every", type=at_least_1, default=100, metavar="N", help="updates between checkpoints")
    add(
        "--batch-size",
        type=at_least_1,
        default=32,
        metavar="N",
        help="windows of text in a batch, of all processes",
    )
    add("--accumulate", type=at_least_1, default=1, metavar="N", help="micro-batches of each process")
    add("--lr", type=positive, default=1e-3, help="learning rate")
    add(
        "--clip-norm",
        type=positive,
        default=1.0,
        metavar="NORM",
        help="largest norm of the gradient at w + epsilon",
    )
    add("--dropout", type=float, default=0.1, metavar="P", help="dropout probability")
    add("--layers", type=at_least_1, default=5, metavar="N", help="layers of the model")
    add("--width", type=at_least_1, default=128, metavar="N", help=f"model width, a multiple of {HEAD}")
    add("--context", type=at_least_1, default=128, metavar="N", help="bytes that the model sees")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="dtype of the passes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=device, help="device to train on")
    add("--seed", type=int, default=1, help="decides weights, batches and dropout masks")
    return parser


def positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return float(text)


def check(args: argparse.Namespace, processes: int, size: int) -> None:
    """Raise ValueError if options do not go together, or do not fit a text of *size* bytes."""
    if args.rho is not None and args.optimizer == "adam":
        raise ValueError("--rho is for --optimizer sam and asam")
    if args.width % HEAD:
        raise ValueError(f"--width must be a multiple of {HEAD}, not {args.width}")
    if args.batch_size % (processes * args.accumulate):
        raise ValueError(
            f"--batch-size must be a multiple of {processes * args.accumulate}, the number of processes "
            f"times --accumulate, not {args.batch_size}"
        )
    if size < 10 * processes * (args.context + 1):
        raise ValueError(
            f"the text has {size} bytes, but {processes} process(es) with --context {args.context} take at "
            f"least {10 * processes * (args.context + 1)}: give more --data, or a smaller --context"
        )
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    if args.device == "cuda" and torch.cuda.device_count() < local:
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} GPUs for {local} processes: start fewer, or "
            "choose --device cpu"
        )


def text_of(files: list[str]) -> bytes:
    """Return the bytes of *files*, or of generated sentences if there are none.

    Raises:
        ValueError: a file is missing.
    """
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"--data {file}: there is no such text file")
    if files:
        return b"".join(Path(file).read_bytes() for file in files)
    return "\n".join(pair.target for pair in generated.pairs(20_000, seed=1)).encode()
