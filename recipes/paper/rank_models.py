"""Trains and measures the models of Table 1 and Figure 2 of the paper, and ranks them (Section 3).

    python -m recipes.paper.rank_models OUT --jobs 2                         # minutes on a CPU
    python -m recipes.paper.rank_models OUT --dataset cifar10 --data data    # at the paper's size

:mod:`recipes.paper.train_models` makes the models, in one run all those with the same mini-batch size and
learning rate. A model that does not reach the stopping criterion is counted and left out.

OUT/models gets a folder for each run. Stopped at any time, the same command goes on with the models that are
missing. OUT/models.json, rank.md, rank.json and rank.png are the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

from fairseq_asam.files import write_json
from fairseq_asam.vision import data
from recipes.paper.rank import rank_statistics, table, write
from recipes.paper.train_models import HYPER_PARAMETERS, MEASURES, arguments, file_name, models
from recipes.runner import Run, complete, flags

#: The rows of Table 1, a column for each of MEASURES.
TABLE_1 = {
    "tau": (0.174, 0.636, 0.257, 0.616),
    "mini-batch size": (0.667, 0.696, 0.777, 0.817),
    "learning rate": (0.563, 0.577, 0.797, 0.806),
    "weight decay": (-0.297, 0.534, -0.469, 0.656),
    "dropout rate": (0.102, -0.092, 0.161, 0.225),
    "average": (0.259, 0.429, 0.316, 0.626),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.paper.rank_models", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 if it is missing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    args = arguments(parser)
    try:
        rank(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"rank_models: {error}")


def rank(args: argparse.Namespace) -> None:
    """Make the models that are missing, rank all, and write the results.

    Raises:
        ValueError, FileNotFoundError: In one sentence, what cannot be.
    """
    images = data.load(args.dataset, args.data, download=args.download).train  # once, for all runs
    if len(images) < max(args.batch_size):
        raise ValueError(f"--batch-size is {max(args.batch_size)}, but there are {len(images)} images")
    files = {run_of(part): [part.out / file_name(model) for model in models(part)] for part in parts(args)}

    def watch(run: Run) -> tuple[float, str]:
        return sum(file.exists() for file in files[run]) / len(files[run]), ""

    complete(list(files), args.jobs, watch)
    found = [json.loads(file.read_text("utf-8")) for of_run in files.values() for file in of_run]
    ranked = [each for each in found if each["reached"]]
    if len(ranked) < 2:
        raise ValueError(
            f"{len(ranked)} of {len(found)} models reached the training loss {args.stop_loss:g}, too few "
            "to rank: choose a larger --stop-loss or more --epochs, and another OUT"
        )
    statistics = rank_statistics(ranked)
    text = f"{table({**statistics, **table_1()})}\n{summary(found, args)}\n"
    write_json(args.out / "models.json", ranked)
    write(args.out, ranked, statistics, text)
    print(text, end="")


def parts(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return *args* for each mini-batch size and learning rate, with a folder of its own."""
    found = []
    for size, lr in itertools.product(args.batch_size, args.lr):
        out = args.out / "models" / f"batch_size-{size}-lr-{lr:g}"
        found.append(argparse.Namespace(**{**vars(args), "batch_size": [size], "lr": [lr], "out": out}))
    return found


def run_of(part: argparse.Namespace) -> Run:
    """Return the run that makes the models of *part*."""
    place = ("out", "data", "download", "jobs")
    options = {name: value for name, value in vars(part).items() if name not in place}
    words = [str(part.out), *flags({**options, "data": part.data})]
    return Run(part.out, options, [[sys.executable, "-m", "recipes.paper.train_models", *words]])


def table_1() -> dict[str, dict[str, Any]]:
    """Return the paper's Table 1 as :func:`~recipes.paper.rank.rank_statistics` would."""
    return {
        f"paper: {measure}": {
            "tau": tau,
            "granulated": dict(zip(HYPER_PARAMETERS, granulated)),
            "average": average,
        }
        for measure, (tau, *granulated, average) in zip(MEASURES, zip(*TABLE_1.values()))
    }


def summary(found: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return what was compared, in sentences."""
    ranked = [each for each in found if each["reached"]]
    losses, gaps = ([each[key] for each in ranked] for key in ("train_loss", "generalization_gap"))
    values = (f"{name} {getattr(args, option)}" for name, option in HYPER_PARAMETERS.items())
    minutes = sum(each["seconds"] for each in found) / 60
    return (
        f"{len(ranked)} of {len(found)} models reached a training loss of {args.stop_loss:g} within "
        f"{args.epochs} epochs (it was then {min(losses):.4f} to {max(losses):.4f}); the others are left "
        f"out. Data set {args.dataset}, model {args.model}, seed {args.seed}; "
        f"{', '.join(values)}. The generalization gap, test loss - training loss, is {min(gaps):.4f} to "
        f"{max(gaps):.4f}. Sharpness: rho = {args.rho:g}, adaptive {args.adaptive_rho:g}, for p = "
        f"inf divided by the square root of the number of weights; ascent steps: {args.steps}. The "
        f"models took {minutes:.1f} minutes in all, on {found[0]['hardware']}."
    )


if __name__ == "__main__":
    main()
