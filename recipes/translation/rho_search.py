"""Searches rho on the validation BLEU of one run for each value, and draws what it found.

    python -m recipes.translation.rho_search SETUP [--optimizers sam asam] [--rho 0.05 0.1 ...] [--seed 1]
                                             [--earlier-searches FILE ...] [--jobs N] [fairseq-train flags]

SETUP is one of recipes/setups.py. Writes rho_search.json and rho_search.png to OUT (default:
runs/translation/SETUP), beside a folder for each run. The test set stays untouched. Run again, it does only
what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from fairseq_asam.files import write_json
from recipes.reporter import best_rho, write_figure
from recipes.runner import Run
from recipes.setups import SETUPS
from recipes.translation.experiment import (
    complete_and_score,
    experiment_arguments,
    experiment_parser,
    experiment_run,
)
from recipes.translation.score import read_lines

#: What a point says of its run, in the order of experiment_run.
TRAINED = ("optimizer", "epochs", "seed", "rho")


def main() -> None:
    parser = experiment_parser("Search rho on validation BLEU.")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=["sam", "asam"],
        metavar="FLAGS",
        help="what follows --optimizer of fairseq-train, like 'asam --ascent-from 0.75' (default: sam asam)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of every run (default: 1)")
    args = experiment_arguments(parser)
    points = search(args, args.optimizers, args.seed, args.epochs)
    write(args.out, [point for found in points.values() for point in found])
    for optimizer, found in points.items():
        print(f"{optimizer}: the best rho is {best(found):g}")


def search(
    args: argparse.Namespace, optimizers: Iterable[str], seed: int, epochs: int
) -> dict[str, list[dict]]:
    """Complete a run of each of *optimizers* for each value of rho, and return their points by optimizer.

    Points that one of the files `args.earlier_searches` has are taken from there.

    Args:
        args: Those of the experiment.
        optimizers: What follows --optimizer of fairseq-train.
        seed: Of every run.
        epochs: Of every run.

    Raises:
        SystemExit: One of *optimizers* has no rho, or a file has no points. No run has begun then.
    """
    of_setup = SETUPS[args.setup].rho
    known = {
        key: point for file in args.earlier_searches for key, point in points_of(file, args.setup).items()
    }
    wanted = []
    for optimizer in optimizers:
        name = optimizer.partition(" ")[0]
        if name not in of_setup:
            sys.exit(f"'{optimizer}' has no rho to search: begin with sam or asam.")
        values = args.rho or of_setup.get(optimizer) or of_setup[name]
        wanted += [(optimizer, epochs, seed, rho) for rho in values]
    runs = {key: experiment_run(args, *key) for key in wanted if key not in known}
    complete_and_score(args.data, list(runs.values()), ["valid"], args.jobs)
    points: dict[str, list[dict]] = {}
    for key in wanted:
        point = known[key] if key in known else {**validation_point(runs[key]), "optimizer": key[0]}
        points.setdefault(key[0], []).append(point)
    return points


def points_of(file: Path, setup: str) -> dict[tuple[str, int, int, float | None], dict]:
    """Return the points of an earlier search by optimizer, epochs, seed and rho.

    Raises:
        SystemExit: *file* has no points, or says that they are of another set-up than *setup*.
    """
    try:
        points = json.loads(file.read_text("utf-8"))
        found = {tuple(point[key] for key in TRAINED): point for point in points}
    except (OSError, ValueError, TypeError, KeyError):
        sys.exit(f"--earlier-searches is '{file}', which is no rho_search.json: name the file of a search.")
    for point in points:
        if point.get("setup", setup) != setup:
            sys.exit(f"--earlier-searches is '{file}', a search of {point['setup']}: name one of {setup}.")
    return found


def validation_point(run: Run) -> dict:
    """Return what *run* trained, and its validation BLEU.

    `ci95` is half the width of the 95 % interval of 1,000 resampled validation sets.
    """
    hypotheses, references = (read_lines(run.folder / f"valid.{end}") for end in ("hyp", "ref"))
    # A test of one system is sacrebleu's public way to its interval.
    _, scores = PairedTest([("", hypotheses)], {"BLEU": BLEU()}, [references], test_type="bs")()
    (scored,) = scores["BLEU"]
    trained = {key: run.options[key] for key in ("setup", *TRAINED)}
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
        by_rho = sorted((point["rho"], point["BLEU"]) for point in own if point["seed"] == seeds[0])
        axes.plot(*zip(*by_rho), color=f"C{number}", label=optimizer)
    values = sorted({point["rho"] for point in points if point["rho"] is not None})
    axes.set(xscale="log", xlabel="$\\rho$", ylabel="validation BLEU")
    axes.set_title("Search for $\\rho$ (hollow: other seeds)")
    axes.set_xticks(values, [f"{rho:g}" for rho in values])
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    main()
