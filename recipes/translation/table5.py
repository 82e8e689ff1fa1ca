"""Table 5 of the ASAM paper: Adam, SAM and ASAM on German-English translation, over several seeds.

    python -m recipes.translation.table5 SETUP [--seeds 1 2 3] [--epochs 50 [--search-epochs 20]] [--jobs N]
                                         [--rho 0.1 0.2 ...] [fairseq-train flags]

SETUP is one of recipes/setups.py: `iwslt14` is the paper's experiment (Section 5.3), for a GPU;
`libreoffice_8000` is one of the size of 2 cores. For SAM and ASAM, rho is the one with the highest
validation BLEU among the runs of the first seed (rho_search.py). With `--search-epochs` these are shorter
than the runs of the table.
SAM and ASAM take two passes, so there is Adam with twice the epochs as well. Each stands in the table a
second time, with the weights of its last 5 epochs averaged. Only the runs in the table translate the test
set. Writes table5.{json,md}, rho_search.{json,png} and curves.png, the means over the seeds, to OUT
(default: runs/translation/SETUP), beside the folders of the runs. Run again, it does what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fairseq_asam.files import write_json
from recipes.reporter import format_number, markdown_table, mean_and_sd, write_figure, write_text
from recipes.runner import Run
from recipes.translation import curves
from recipes.translation.compare import training_figures
from recipes.translation.experiment import (
    average_of,
    comparison_arguments,
    comparison_parser,
    complete_systems,
    experiment_run,
)
from recipes.translation.rho_search import best, search, validation_point, write
from recipes.translation.score import METRICS, read_lines
from recipes.translation.significance import paired_bootstrap, t_test
from recipes.translation.train_log import training_seconds

LOSSES = ("best_valid_loss", "last_valid_loss", "last_train_loss")
DIFFERENCE = ("difference", "p", "t interval")
ABOUT_TIME = "The time of an epoch is that of the fastest seed."
#: Validation and test BLEU of tokens in Table 5 of the paper.
PAPER = {"Adam": (35.34, 34.86), "Adam+SAM": (35.52, 34.78), "Adam+ASAM": (35.66, 35.02)}


def main() -> None:
    args = comparison_arguments(comparison_parser("Table 5 of the ASAM paper, over several seeds."))
    points = search(args, ("sam", "asam"), args.seeds[0], args.search_epochs)

    def runs(optimizer: str, epochs: int = args.epochs, rho: float | None = None) -> list[Run]:
        return [experiment_run(args, optimizer, epochs, seed, rho) for seed in args.seeds]

    systems = {
        "Adam": runs("adam"),
        "Adam, twice the epochs": runs("adam", epochs=2 * args.epochs),
        "Adam+SAM": runs("sam", rho=best(points["sam"])),
        "Adam+ASAM": runs("asam", rho=best(points["asam"])),
    }
    averages = {f"{name}, averaged": [average_of(run) for run in runs] for name, runs in systems.items()}
    complete_systems(args, systems)
    complete_systems(args, averages)

    results = collect(args, {**systems, **averages})
    table = as_markdown(results)
    write_json(args.out / "table5.json", results)
    write_text(args.out / "table5.md", table)
    others = []
    if args.search_epochs == args.epochs:
        others = systems["Adam"] + [run for name in ("Adam+SAM", "Adam+ASAM") for run in systems[name][1:]]
    write(args.out, [*points["sam"], *points["asam"], *map(validation_point, others)])
    figure = curves.draw({name: [run.log for run in runs] for name, runs in systems.items()})
    write_figure(args.out / "curves.png", figure)
    print(table, end="")


def collect(args: argparse.Namespace, systems: dict[str, list[Run]]) -> dict:
    """Return what the table shows: the runs of each system with their figures, means and standard deviations.

    Losses are in bits per token. The first system is the baseline, against which the others are tested on
    the test set, as significance.py has it.
    """
    baseline = next(iter(systems.values()))
    references = read_lines(baseline[0].folder / "test.ref")
    rows = []
    for name, runs in systems.items():
        figures = [run_figures(run) for run in runs]
        measured = [key for key, value in figures[0].items() if isinstance(value, float)]
        spread = {key: mean_and_sd([figure[key] for figure in figures]) for key in measured}
        row = {
            "system": name,
            "rho": runs[0].options["rho"],
            "epochs": runs[0].options["epochs"],
            "runs": [{"seed": run.options["seed"], **figure} for run, figure in zip(runs, figures)],
            "mean": {key: mean for key, (mean, _) in spread.items()},
            "sd": {key: sd for key, (_, sd) in spread.items()},
        }
        if "averaged epochs" not in runs[0].options:
            row["training_seconds"] = training_seconds([run.log for run in runs])
        if runs is not baseline:
            translated = [[read_lines(run.folder / "test.hyp") for run in each] for each in (baseline, runs)]
            row["against baseline"] = {
                metric: {
                    **paired_bootstrap(metric, *translated, references),
                    **t_test(*([run[f"test {metric}"] for run in each["runs"]] for each in (rows[0], row))),
                }
                for metric in METRICS
            }
        rows.append(row)
    first = baseline[0].folder
    return {
        "setup": args.setup,
        "flags": args.flags,
        "sentences": {split: len(read_lines(first / f"{split}.ref")) for split in ("valid", "test")},
        "signatures": read_score(first, "test")["signatures"],
        "systems": rows,
    }


def run_figures(run: Run) -> dict:
    """Return the scores of *run* and, if it is a training, what its log says."""
    scores = {split: read_score(run.folder, split) for split in ("valid", "test")}
    figures = {
        f"{split} {scale}": scores[split][scale]
        for scale in (*METRICS, "BLEU of tokens")
        for split in ("valid", "test")
    }
    if "averaged epochs" in run.options:
        return figures
    training = training_figures(run.folder)
    return {
        **{key: training[key] for key in ("best_epoch", *LOSSES)},
        **figures,
    }


def read_score(folder: Path, split: str) -> dict:
    return json.loads((folder / f"{split}.json").read_text("utf-8"))


def as_markdown(results: dict) -> str:
    """Return three tables: training, sacrebleu's scores, and BLEU of tokens beside the paper's."""
    training, scores, of_tokens = [], [], []
    for row in results["systems"]:
        name = row["system"]
        if "training_seconds" in row:
            rho = "" if row["rho"] is None else f"{row['rho']:g}"
            losses = [spread(row, key, 3) for key in LOSSES]
            training.append([name, rho, str(row["epochs"]), time_ratio(results, row), *losses])
        against = row.get("against baseline")
        tested = [cell for metric in METRICS for cell in difference(against and against[metric])]
        means = [spread(row, key) for key in ("valid BLEU", "test BLEU", "test chrF2")]
        scores.append([name, *means[:2], *tested[:3], means[2], *tested[3:]])
        paper = [format_number(score) for score in PAPER.get(name, (None, None))]
        of_tokens.append(
            [name, *(spread(row, f"{split} BLEU of tokens") for split in ("valid", "test")), *paper]
        )
    seeds = ", ".join(str(run["seed"]) for run in results["systems"][0]["runs"])
    return "\n".join(
        [
            f"Set-up `{results['setup']}`, seeds {seeds}; mean ± standard deviation over the seeds. "
            f"{ABOUT_TIME} Losses in bits per token, the best by epoch and the last.\n",
            markdown_table(
                [
                    *("optimizer", "rho", "epochs", "time / Adam's"),
                    *("best validation loss", "last validation loss", "last training loss"),
                ],
                training,
            ),
            f"{about_scores(results)}\n",
            markdown_table(
                [
                    *("optimizer", "validation BLEU", "test BLEU", *DIFFERENCE),
                    *("test chrF2", *DIFFERENCE),
                ],
                scores,
            ),
            "BLEU of tokens, as fairseq-generate prints it, beside that of the paper on IWSLT'14 (its Table "
            "5). Not comparable with the figures above, nor, on another corpus, with the paper's:\n",
            markdown_table(
                ["optimizer", "validation", "test", "paper: validation", "paper: test"], of_tokens
            ),
        ]
    )


def about_scores(results: dict) -> str:
    """Return what scores and differences are of, and how they are made."""
    counts = results["sentences"]
    return (
        f"Scores by sacrebleu, {counts['valid']} validation and {counts['test']} test sentences, "
        f"{', '.join(f'`{signature}`' for signature in results['signatures'])}. Differences of the test "
        "scores from Adam's have two intervals of 95 %: in brackets, with p, that of a paired bootstrap over "
        "seeds and sentences, which is too narrow with few seeds; and the t interval over the seeds alone."
    )


def difference(test: dict | None) -> tuple[str, ...]:
    """Return the cells under DIFFERENCE; empty ones for the baseline."""
    if test is None:
        return ("",) * len(DIFFERENCE)
    p = test["p_value"]
    return (
        f"{test['difference']:+.2f} ({between(test['interval'])})",
        f"{p:.3f}" if p >= 0.001 else "< 0.001",
        between(test["t_interval"]),
    )


def between(interval: Sequence[float] | None) -> str:
    """Return an interval in words; nothing if there is none."""
    return "{:+.2f} to {:+.2f}".format(*interval) if interval else ""


def spread(row: dict, key: str, digits: int = 2) -> str:
    """Return mean ± standard deviation of a figure."""
    return format_number(row["mean"][key], row["sd"][key], digits)


def time_ratio(results: dict, row: dict) -> str:
    """Return the training time of *row* divided by the baseline's."""
    seconds = results["systems"][0]["training_seconds"]
    return format_number(row["training_seconds"] / seconds if seconds else None)


if __name__ == "__main__":
    main()
