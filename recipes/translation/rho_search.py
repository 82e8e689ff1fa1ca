"""Searches rho on the validation BLEU of one run for each value, and draws what it found.

    python -m recipes.translation.rho_search embedded|iwslt14 [--optimizers sam asam] [--rho 0.05 0.1 ...]
                                             [--seed 1] [--jobs N] [fairseq-train flags]

Writes rho_search.json and rho_search.png to OUT (default: runs/translation/SETTING), beside a folder for each
run. The test set is not touched. Run again, it does only what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sacrebleu.metrics import BLEU

from fairseq_asam.files import whole
from recipes.translation.experiment import Experiment, Run
from recipes.translation.files import read_lines
from recipes.translation.settings import SETTINGS


def main() -> None:
    parser = experiment_parser("Search rho on validation BLEU.")
    parser.add_argument("--optimizers", nargs="+", choices=["sam", "asam"], default=["sam", "asam"])
    parser.add_argument("--seed", type=int, default=1, help="of every run (default: 1)")
    args, flags = parser.parse_known_args()
    experiment = experiment_of(args, flags)
    epochs = args.epochs or SETTINGS[args.setting].epochs
    points = [
        point
        for optimizer in args.optimizers
        for point in search(experiment, optimizer, args.rho, epochs, args.seed)
    ]
    write(experiment.out, points)
    for optimizer in args.optimizers:
        print(f"{optimizer}: the best rho is {best_rho(points, optimizer):g}")


def experiment_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the options that say which setting runs, and where and how."""
    parser = argparse.ArgumentParser(
        description=description, epilog="Other flags go to every fairseq-train.", allow_abbrev=False
    )
    parser.add_argument("setting", choices=list(SETTINGS), help="corpus and model")
    parser.add_argument("--data", type=Path, help="corpus folder of data_prep (default: data/SETTING)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/translation/SETTING)")
    parser.add_argument("--epochs", type=int, help="of each run (default: the setting's)")
    parser.add_argument("--rho", type=float, nargs="+", help="values to search (default: the setting's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    return parser


def experiment_of(args: argparse.Namespace, flags: list[str]) -> Experiment:
    """The experiment that the options describe; exits with a sentence where they can't be followed."""
    data = args.data or Path("data", args.setting)
    for option, value in (("--jobs", args.jobs), ("--epochs", args.epochs)):
        if value is not None and value < 1:
            sys.exit(f"{option} is {value}: it must be at least 1.")
    if not (data / "bin").is_dir():
        sys.exit(f"'{data}' holds no corpus: make it with 'python -m data_prep.{args.setting} {data}'.")
    out = args.out or Path("runs/translation", args.setting)
    return Experiment(args.setting, data, out, args.jobs, tuple(flags))


def search(
    experiment: Experiment, optimizer: str, values: list[float] | None, epochs: int, seed: int
) -> list[dict]:
    """Complete a run of `optimizer` for each of `values` (default: the setting's); return their points."""
    values = values or SETTINGS[experiment.setting].rho[optimizer]
    runs = [Run(optimizer, epochs, seed, rho) for rho in values]
    experiment.complete(runs, ["valid"])
    return [validation_point(experiment, run) for run in runs]


def validation_point(experiment: Experiment, run: Run) -> dict:
    """The fields of `run` and its validation BLEU: `BLEU`, and `ci95`, half the width of the 95 % interval of
    1,000 resampled validation sets."""
    hypotheses, references = (read_lines(experiment.folder(run) / f"valid.{end}") for end in ("hyp", "ref"))
    scored = BLEU().corpus_score(hypotheses, [references], n_bootstrap=1000)
    return {**asdict(run), "BLEU": scored.score, "ci95": scored._ci}


def best_rho(points: list[dict], optimizer: str) -> float:
    """The rho of the point of `optimizer` with the highest validation BLEU; the smaller one of equals."""
    own = [point for point in points if point["optimizer"] == optimizer]
    return max(own, key=lambda point: (point["BLEU"], -point["rho"]))["rho"]


def write(out: Path, points: list[dict]) -> None:
    """Write the points to `out` as rho_search.json and rho_search.png; those without rho are the baseline."""
    with whole(out / "rho_search.json") as file:
        file.write_text(json.dumps(points, indent=2) + "\n", "utf-8")
    with whole(out / "rho_search.png") as file:
        draw(points).savefig(file, format="png", dpi=150)


def draw(points: list[dict]) -> plt.Figure:
    """Validation BLEU over rho, a point for each run with its 95 % interval; a line through those of the
    search, which has one seed. Runs of other seeds are hollow."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
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
            # beside each other, or the intervals of several seeds and optimizers would hide one another
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
