"""Whether the flatter of trained models translate better: their sharpness beside their BLEU.

    python -m recipes.translation.flatness DATA OUT RUN RUN... [--split valid] [--rho 0.1 0.2] [--batches 10]

DATA is a corpus folder of data_prep. A RUN is a folder of train.py, or of its averaged checkpoints, of which
score.py has translated the split; its best checkpoint counts. Sharpness and adaptive sharpness (Equations 2
and 4 of the paper, p = 2, in nats per token) are those on random batches of the training set, the same for
all runs, without dropout. Runs that differ in the seed alone are one system. Kendall's tau is over the means
of the systems: it is below 0 where the flatter system has the higher BLEU. Writes OUT/flatness.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import kendalltau
from tqdm import tqdm

from fairseq_asam import Region, measure
from fairseq_asam.files import write_json
from fairseq_asam.measuring.fairseq_checkpoints import DatasetLoss, load
from recipes.options import at_least_1
from recipes.reporter import format_number, markdown_table, mean_and_sd, write_figure, write_text

#: The normalization operator of each kind of sharpness.
KINDS = {"sharpness": "none", "adaptive sharpness": "element-wise"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Test whether flatter models translate better.")
    parser.add_argument("data", type=Path, help="corpus folder of data_prep")
    parser.add_argument("out", type=Path, help="folder for flatness.json, flatness.md and flatness.png")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs or of averages")
    parser.add_argument("--split", default="valid", help="the split whose BLEU counts (default: valid)")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.1, 0.2], help="radii (default: 0.1 0.2)")
    parser.add_argument(
        "--batches", type=at_least_1, default=10, help="batches of the training set (default: 10)"
    )
    args = parser.parse_args()
    for file in (run / name for run in args.runs for name in ("checkpoint_best.pt", f"{args.split}.json")):
        if not file.exists():
            sys.exit(f"flatness.py: '{file}' is missing: train the run and translate the split first.")
    names = {system_of(run) for run in args.runs}
    if len(names) < 2:
        sys.exit(f"flatness.py: all runs are of one system, '{names.pop()}': name runs of two or more.")
    try:
        runs = [
            figures_of(run, args.data, args.split, args.rho, args.batches)
            for run in tqdm(args.runs, unit="run", disable=None)
        ]
    except ValueError as error:
        sys.exit(f"flatness.py: {error}.")
    correlations = {name: correlation(runs, name) for name in runs[0]["measures"]}
    table = as_markdown(runs, args.split, correlations)
    setting = {"split": args.split, "batches": args.batches}
    write_json(args.out / "flatness.json", {**setting, "runs": runs, "tau": correlations})
    write_text(args.out / "flatness.md", table)
    write_figure(args.out / "flatness.png", draw(runs, args.split, correlations))
    print(table, end="")


def figures_of(run: Path, data: Path, split: str, radii: list[float], batches: int) -> dict[str, Any]:
    """Return what the table and the picture show of *run*.

    Raises:
        ValueError: The checkpoint does not fit the corpus, or a radius or the number of batches is wrong.
    """
    regions = {
        f"{kind}, rho {rho:g}": Region(rho, normalization=normalization)
        for rho in radii
        for kind, normalization in KINDS.items()
    }
    checkpoint = load(str(run / "checkpoint_best.pt"), str(data / "bin"))
    loss = DatasetLoss(checkpoint, "train", batches=batches)
    measured = measure(loss, checkpoint.model, list(regions.values()))
    return {
        "run": str(run),
        "system": system_of(run),
        "BLEU": json.loads((run / f"{split}.json").read_text("utf-8"))["BLEU"],
        "training loss": measured[0].loss,
        "measures": {name: sharpness.value for name, sharpness in zip(regions, measured)},
    }


def system_of(run: Path) -> str:
    """Return in words what *run* shares with those that differ in the seed alone."""
    options = json.loads((run / "run.json").read_text("utf-8"))["options"]
    words = [options["optimizer"]]
    if options["rho"] is not None:
        words.append(f"rho {options['rho']:g}")
    words.append(f"{options['epochs']} epochs")
    flags = list(options["flags"])
    for said in ("--rho", "--max-epoch", "--seed", "--keep-last-epochs"):
        while said in flags:
            at = flags.index(said)
            del flags[at : at + 2]
    if flags:
        words.append(" ".join(flags))
    if "averaged epochs" in options:
        words.append("averaged")
    return ", ".join(words)


def correlation(runs: list[dict[str, Any]], measure: str) -> dict[str, float]:
    """Return Kendall's tau of *measure* and BLEU over the means of the systems, and its p.

    Seeds of one system say little of other systems, so that tau over all runs would have too small a p.
    """
    of_systems = systems(runs).values()
    values = [[statistics.mean(run["measures"][measure] for run in each) for each in of_systems]]
    values.append([statistics.mean(run["BLEU"] for run in each) for each in of_systems])
    found = kendalltau(*values)
    return {"tau": float(found.statistic), "p": float(found.pvalue)}


def systems(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return *runs* by system."""
    return {name: [run for run in runs if run["system"] == name] for name in {r["system"]: 0 for r in runs}}


def as_markdown(runs: list[dict[str, Any]], split: str, correlations: dict[str, dict[str, float]]) -> str:
    """Return the table of the systems, and below them *correlations*, by measure."""
    rows = []
    for system, of_system in systems(runs).items():
        bleu = format_number(*mean_and_sd([run["BLEU"] for run in of_system]))
        loss = format_number(*mean_and_sd([run["training loss"] for run in of_system]), digits=3)
        of_measures = [[run["measures"][name] for run in of_system] for name in correlations]
        values = [format_number(*mean_and_sd(of_measure), digits=4) for of_measure in of_measures]
        rows.append([system, str(len(of_system)), bleu, loss, *values])
    for label, figure in (("Kendall's tau with BLEU", "tau"), ("p", "p")):
        values = [format_number(found[figure], digits=3) for found in correlations.values()]
        rows.append([label, "", "", "", *values])
    header = ["", "runs", f"{split} BLEU", "training loss", *correlations]
    return markdown_table(header, rows)


def draw(runs: list[dict[str, Any]], split: str, correlations: dict[str, dict[str, float]]) -> Figure:
    """Return a figure of BLEU over each measure, a point for each run."""
    rows = len(correlations) // len(KINDS)
    figure = Figure(figsize=(9, 3.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, len(KINDS), squeeze=False, sharey=True)
    for panel, (name, found) in zip(panels.flat, correlations.items()):
        for number, (system, of_system) in enumerate(systems(runs).items()):
            x = [run["measures"][name] for run in of_system]
            panel.scatter(x, [run["BLEU"] for run in of_system], s=24, color=f"C{number}", label=system)
        panel.set(xlabel=f"{name} (nats per token)")
        panel.locator_params(axis="x", nbins=5)
        panel.set_title(f"$\\tau$ = {found['tau']:.2f}", fontsize=10)
    for panel in panels[:, 0]:
        panel.set_ylabel(f"{split} BLEU")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    main()
