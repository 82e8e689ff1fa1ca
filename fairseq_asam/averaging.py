"""Averages the weights of checkpoints of a fairseq run.

    python -m fairseq_asam.averaging RUN OUT [--last 5] [--by epochs|updates]
    python -m fairseq_asam.averaging RUN OUT --checkpoints A.pt B.pt ...

RUN is a folder of checkpoints, the --save-dir of fairseq-train. OUT is the file to write. It loads wherever a
checkpoint of the run loads: ``fairseq-generate DATA --user-dir fairseq_asam --path OUT``.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

logging.basicConfig(level=logging.WARNING)  # before a model of fairseq sets DEBUG for all
# fairseq and fairscale call functions that torch will remove.
warnings.filterwarnings("ignore", message=r"`torch\.(jit\.script|cuda\.amp\.custom_)")
import fairseq_asam.tasks  # noqa: F401  names the types in a fairseq checkpoint that torch may load
from fairseq_asam.files import whole

LAST = 5
#: How fairseq-train names the checkpoints that it keeps, and which flag keeps them.
NAMES = {"epochs": r"checkpoint(\d+)\.pt", "updates": r"checkpoint_\d+_(\d+)\.pt"}
KEPT_BY = {"epochs": "--keep-last-epochs", "updates": "--save-interval-updates N --keep-interval-updates"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_asam.averaging",
        description="Average the weights of checkpoints of a fairseq run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--last", type=int, help=f"number of checkpoints, the newest ones (default: {LAST})")
    parser.add_argument(
        "--by",
        choices=list(NAMES),
        help="average checkpoints of epochs (checkpoint5.pt) or of updates (checkpoint_3_400.pt); default: "
        "of epochs if RUN has any, otherwise of updates",
    )
    parser.add_argument("--checkpoints", nargs="+", metavar="FILE", help="average these files of RUN instead")
    args = parser.parse_args()
    if args.checkpoints and (args.last is not None or args.by):
        parser.error("--checkpoints names the files, so --last and --by have no meaning: leave them out")
    try:
        if args.checkpoints:
            files = [args.run / name for name in args.checkpoints]
        else:
            files = newest(args.run, LAST if args.last is None else args.last, args.by)
        if args.out.is_dir():
            raise ValueError(
                f"OUT is '{args.out}', a folder: give the name of a file, as '{args.out}/averaged.pt'"
            )
        if args.out.resolve() in [file.resolve() for file in files]:
            raise ValueError(f"OUT is '{args.out}', one of the checkpoints to average: give another name")
        averaged = average(files)
        with whole(args.out) as file:
            try:
                torch.save(averaged, file)
            except RuntimeError as error:  # of torch, on a full disk
                raise OSError(f"'{args.out}' cannot be written: {str(error).splitlines()[0]}") from error
    except (OSError, ValueError) as error:
        sys.exit(f"averaging: {error}.")
    print(f"'{args.out}' has the mean of the weights of {', '.join(file.name for file in files)}")


def newest(run: Path, last: int = LAST, by: str | None = None) -> list[Path]:
    """Return the files of the newest checkpoints of a fairseq run, the oldest of them first.

    Args:
        run: Folder of checkpoints.
        last: How many.
        by: "epochs" for checkpoints such as checkpoint5.pt, "updates" for those such as checkpoint_3_400.pt.
            ``None``: "epochs" if there is any such checkpoint, otherwise "updates".

    Raises:
        ValueError: *last* is below 1, or *run* has fewer checkpoints of this kind.
    """
    if last < 1:
        raise ValueError(f"the number of checkpoints is {last}, but it must be at least 1")
    if not run.is_dir():
        raise ValueError(
            f"'{run}' is no folder: name the folder of checkpoints (--save-dir of fairseq-train)"
        )
    found = {
        kind: sorted(
            (int(match[1]), file) for file in run.iterdir() if (match := re.fullmatch(name, file.name))
        )
        for kind, name in NAMES.items()
    }
    by = by or ("epochs" if found["epochs"] else "updates")
    if len(found[by]) < last:
        raise ValueError(
            f"'{run}' has {len(found[by])} checkpoints of {by}, not {last}: train with {KEPT_BY[by]} {last}, "
            "average fewer with --last, or choose others with --by or --checkpoints"
        )
    return [file for _, file in found[by][-last:]]


def average(files: Sequence[Path]) -> dict[str, Any]:
    """Return the last checkpoint of *files*, its weights replaced by the mean of the weights of all.

    The mean is taken in float64 and rounded once, to the type of the last checkpoint. Whole numbers, such as
    counts of batches, stay those of the last checkpoint. Weights that share memory there still share it if
    their means are equal. Memory holds one checkpoint at a time and the sums.

    Raises:
        ValueError: There is no file, one is named twice, one is no checkpoint of fairseq, or its weights have
            other names or shapes than those of the first.
    """
    if not files:
        raise ValueError("there is no checkpoint to average")
    sums: dict[str, Tensor] = {}
    for number, file in enumerate(tqdm(files, desc="averaging", unit="checkpoint", disable=None)):
        if file.resolve() in [earlier.resolve() for earlier in files[:number]]:
            raise ValueError(f"'{file}' is named twice")
        checkpoint = load(file)
        kinds = {
            n: (is_averaged(value), getattr(value, "shape", ())) for n, value in checkpoint["model"].items()
        }
        if number == 0:
            first = kinds
        for name in [*first, *kinds]:
            if first.get(name) != kinds.get(name):
                raise ValueError(f"'{file}' is of another model than '{files[0]}': '{name}' is not the same")
        for name, weight in checkpoint["model"].items():
            if is_averaged(weight):
                precise = weight.to(torch.promote_types(weight.dtype, torch.float64))
                sums[name] = sums[name] + precise if number else precise
    means: dict[tuple, Tensor] = {}
    for name, total in sums.items():
        weight = checkpoint["model"][name]
        memory = (weight.untyped_storage().data_ptr(), weight.storage_offset(), weight.shape, weight.stride())
        mean = (total / len(files)).to(weight.dtype)
        shared = means.setdefault(memory, mean)
        checkpoint["model"][name] = shared if torch.equal(shared, mean) else mean
    return checkpoint


def is_averaged(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def load(file: Path) -> dict[str, Any]:
    """Return a checkpoint of fairseq. From torch 2.4 on, no code in the file is run.

    Raises:
        OSError: *file* cannot be read.
        ValueError: *file* is missing, no checkpoint of fairseq, or holds types that fairseq does not save.
    """
    if not file.is_file():
        raise ValueError(f"the checkpoint '{file}' does not exist")
    try:
        safely = hasattr(torch.serialization, "add_safe_globals")
        checkpoint = torch.load(file, map_location="cpu", weights_only=safely)
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        if unsafe := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"'{file}' holds a {unsafe[1]}, which is not loaded as it may run code"
            ) from error
        raise ValueError(f"'{file}' is damaged or no checkpoint of fairseq") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), Mapping):
        raise ValueError(f"'{file}' is no checkpoint of fairseq: it has no weights under 'model'")
    return checkpoint


if __name__ == "__main__":
    main()
