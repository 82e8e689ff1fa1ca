"""Searches rho on the validation BLEU of one run for each value, and draws what it found.

    python -m recipes.translation.rho_search SETUP [--optimizers sam asam] [--rho 0.05 0.1 ...] [--seed 1]
                                             [--jobs N] [fairseq-train flags]

SETUP is one of recipes/setups.py. Writes rho_search.json and rho_search.png to OUT (default:
runs/translation/SETUP), beside a folder for each run. The test set stays untouched. Run again, it does only
what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from fairseq_asam.files import write_json
from recipes.reporter import best_rho, write_figure
from recipes.runner import Run, complete
from recipes.setups import SETUPS
from recipes.translation.score import read_lines
from recipes.translation.train import training, watch


def main() -> None:
    parser = experiment_parser("Search rho on validation BLEU.")
    parser.add_argument("--optimizers", nargs="+", choices=["sam", "asam"], default=["sam", "asam"])
    parser.add_argument("--seed", type=int, default=1, help="of every run (default: 1)")
    args = experiment_arguments(parser)
    points = {optimizer: search(args, optimizer, args.seed) for optimizer in args.optimizers}
    write(args.out, [point for found in points.values() for point in found])
    for optimizer, found in points.items():
        print(f"{optimizer}: the best rho is {best(found):g}")


def experiment_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all experiments share."""
    parser = argparse.ArgumentParser(
        description=description, epilog="Other flags go to every fairseq-train.", allow_abbrev=False
    )
    parser.add_argument("setup", choices=list(SETUPS), help="corpus, model and training")
    parser.add_argument(
        "--data", type=Path, help="corpus folder of data_prep (default: the set-up's in data/)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/translation/SETUP)")
    parser.add_argument("--epochs", type=int, help="of each run (default: the set-up's)")
    parser.add_argument("--rho", type=float, nargs="+", help="values to search (default: the set-up's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    return parser


def experiment_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options with their defaults, and as `flags` those for fairseq-train.

    Raises:
        SystemExit: A value cannot be used.
    """
    args, flags = parser.parse_known_args()
    if args.epochs is not None and args.epochs < 1:
        sys.exit(f"--epochs is {args.epochs}, but it must be at least 1.")
    args.flags = flags
    args.data = SETUPS[args.setup].folder(args.data)
    args.out = args.out or Path("runs/translation", args.setup)
    args.epochs = args.epochs or SETUPS[args.setup].epochs
    return args


def experiment_run(
    args: argparse.Namespace,
    optimizer: str,
    epochs: int,
    seed: int,
    rho: float | None = None,
    form: Sequence[str] = (),
) -> Run:
    """Return one training of an experiment; *form* are its own flags of fairseq-train."""
    own = [*([] if rho is None else ["--rho", f"{rho:g}"]), *form]
    name = "-".join([optimizer, f"{epochs}-epochs", *(word.lstrip("-") for word in own), f"seed-{seed}"])
    flags = ["--max-epoch", str(epochs), "--seed", str(seed), *own, *args.flags]
    return training(args.setup, optimizer, args.data, args.out / name, flags)


def train_and_score(data: Path, runs: Sequence[Run], splits: Sequence[str], jobs: int) -> None:
    """Complete the trainings *runs* on the corpus in *data*, and translate *splits* with each."""
    complete(runs, jobs, watch)
    score = [sys.executable, "-m", "recipes.translation.score", str(data)]
    scoring = []
    for run, split in itertools.product(runs, splits):
        options = {**run.options, "split": split}
        scoring.append(Run(run.folder / split, options, [[*score, str(run.folder), "--split", split]]))
    complete(scoring, jobs)


def search(args: argparse.Namespace, optimizer: str, seed: int) -> list[dict]:
    """Complete a run of *optimizer* for each value of rho, and return their points."""
    values = args.rho or SETUPS[args.setup].rho[optimizer]
    runs = [experiment_run(args, optimizer, args.epochs, seed, rho) for rho in values]
    train_and_score(args.data, runs, ["valid"], args.jobs)
    return [validation_point(run) for run in runs]


def validation_point(run: Run) -> dict:
    """Return what *run* trained, and its validation BLEU.

    `ci95` is half the width of the 95 % interval of 1,000 resampled validation sets.
    """
    hypotheses, references = (read_lines(run.folder / f"valid.{end}") for end in ("hyp", "ref"))
    # A test of one system is sacrebleu's public way to its interval.
    _, scores = PairedTest([("", hypotheses)], {"BLEU": BLEU()}, [references], test_type="bs")()
    (scored,) = scores["BLEU"]
    trained = {key: run.options[key] for key in ("optimizer", "epochs", "seed", "rho")}
    return {**trained, "BLEU": scored.score, "ci95": float(scored.ci)}


def best(points: Sequence[dict]) -> float:
    """Return the rho of the highest validation BLEU."""
    return best_rho({point["rho"]: point["BLEU"] for point in points})


def write(out: Path, points: list[dict]) -> None:
    """Write rho_search.json and rho_search.png to the folder *out*. Points without rho are the baseline."""
    write_json(out / "rho_search.json", points)
    write_figure(out / "rho_search.png", draw(points))


def draw(points: list[dict]) -> Figure:
    """Return a figure of validation BLEU over rho: a point with its 95 % interval for each run.

    A line joins the points of the search, which has one seed. Those of other seeds are hollow.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    baseline = [point["BLEU"] for point in points if point["rho"] is None]
    if baseline:
        axes.axhspan(min(baseline), max(baseline), color="grey", alpha=0.3, linewidth=0)
        mean = sum(baseline) / len(baseline)
        axes.axhline(mean, color="grey", label=f"adam, mean and range of {len(baseline)}")
    optimizers = dict.fromkeys(point["optimizer"] for point in points if point["rho"] is not None)
    for number, optimizer in enumerate(optimizers):
        own = [point for point in points if point["optimizer"] == optimizer]
        seeds = list(dict.fromkeys(point["seed"] for point in own))
        for point in own:
            # Put them beside each other: intervals of several seeds and optimizers would hide one another.
            x = point["rho"] * 1.04 ** (seeds.index(point["seed"]) + 0.5 * number)
            filling = {} if point["seed"] == seeds[0] else {"markerfacecolor": "none"}
            style = {"fmt": "o", "markersize": 4, "alpha": 0.5, "color": f"C{number}", **filling}
            axes.errorbar(x, point["BLEU"], point["ci95"], **style)
        searched = sorted((point["rho"], point["BLEU"]) for point in own if point["seed"] == seeds[0])
        axes.plot(*zip(*searched), color=f"C{number}", label=optimizer)
    values = sorted({point["rho"] for point in points if point["rho"] is not None})
    axes.set(xscale="log", xlabel="$\\rho$", ylabel="validation BLEU")
    axes.set_title("Search for $\\rho$ (hollow: other seeds)")
    axes.set_xticks(values, [f"{rho:g}" for rho in values])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    main()
