"""Table 5 of the ASAM paper: Adam, SAM and ASAM on German-English translation, over several seeds.

    python -m recipes.translation.table5 SETUP [--seeds 1 2 3] [--jobs N] [--rho ...] [fairseq-train flags]

SETUP is one of recipes/setups.py: `iwslt14` is the paper's experiment (Section 5.3), for a GPU; `embedded`
takes two hours on 2 cores. For SAM and ASAM, rho is the one with the highest validation BLEU among the runs
of the first seed (rho_search.py). They take two passes, so there is Adam with twice the epochs as well. Only
the runs in the table translate the test set. Writes table5.{json,md}, rho_search.{json,png} and, of the first
seed, curves.png to OUT (default: runs/translation/SETUP), beside the folders of the runs. Run again, it does
what is missing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from fairseq_asam.files import write_json
from recipes.reporter import markdown_table, mean_and_sd, shown, write_figure, write_text
from recipes.runner import Run
from recipes.translation import curves
from recipes.translation.compare import training_figures
from recipes.translation.rho_search import (
    best,
    experiment_arguments,
    experiment_parser,
    experiment_run,
    search,
    train_and_score,
    validation_point,
    write,
)
from recipes.translation.score import read_lines

#: Validation and test BLEU of tokens in Table 5 of the paper.
PAPER = {"Adam": (35.34, 34.86), "Adam+SAM": (35.52, 34.78), "Adam+ASAM": (35.66, 35.02)}


def main() -> None:
    parser = experiment_parser("Table 5 of the ASAM paper, over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    args = experiment_arguments(parser)
    seeds = list(dict.fromkeys(args.seeds))

    points = {optimizer: search(args, optimizer, seeds[0]) for optimizer in ("sam", "asam")}

    def runs(optimizer: str, epochs: int = args.epochs, rho: float | None = None) -> list[Run]:
        return [experiment_run(args, optimizer, epochs, seed, rho) for seed in seeds]

    systems = {
        "Adam": runs("adam"),
        "Adam, twice the epochs": runs("adam", epochs=2 * args.epochs),
        "Adam+SAM": runs("sam", rho=best(points["sam"])),
        "Adam+ASAM": runs("asam", rho=best(points["asam"])),
    }
    every = [run for runs in systems.values() for run in runs]
    train_and_score(args.data, every, ["valid", "test"], args.jobs)

    results = collect(args, systems)
    table = as_markdown(results)
    write_json(args.out / "table5.json", results)
    write_text(args.out / "table5.md", table)
    others = [run for name in ("Adam+SAM", "Adam+ASAM") for run in systems[name][1:]]
    others = [validation_point(run) for run in (*systems["Adam"], *others)]
    write(args.out, [*points["sam"], *points["asam"], *others])
    figure = curves.draw({name: runs[0].log for name, runs in systems.items()})
    write_figure(args.out / "curves.png", figure)
    print(table, end="")


def collect(args: argparse.Namespace, systems: dict[str, list[Run]]) -> dict:
    """Return what the table shows: the runs of each system with their figures, means and standard deviations.

    Losses are in bits per token. The first system is the baseline. `p_value` is that of a paired bootstrap
    test of test BLEU against the baseline's run of the same seed.
    """
    baseline = next(iter(systems.values()))
    rows = []
    for name, runs in systems.items():
        figures = [run_figures(run.folder) for run in runs]
        measured = [key for key, value in figures[0].items() if isinstance(value, float)]
        spread = {key: mean_and_sd([figure[key] for figure in figures]) for key in measured}
        if runs is not baseline:
            for run, first, figure in zip(runs, baseline, figures):
                figure["p_value"] = p_value(first.folder, run.folder)
        rows.append(
            {
                "system": name,
                "rho": runs[0].options["rho"],
                "epochs": runs[0].options["epochs"],
                "runs": [{"seed": run.options["seed"], **figure} for run, figure in zip(runs, figures)],
                "mean": {key: mean for key, (mean, _) in spread.items()},
                "sd": {key: sd for key, (_, sd) in spread.items()},
            }
        )
    first = baseline[0].folder
    return {
        "setup": args.setup,
        "flags": args.flags,
        "sentences": {split: len(read_lines(first / f"{split}.ref")) for split in ("valid", "test")},
        "signature": read_score(first, "test")["signature"],
        "systems": rows,
    }


def run_figures(folder: Path) -> dict:
    training = training_figures(folder)
    scores = {split: read_score(folder, split) for split in ("valid", "test")}
    return {
        "training_seconds": float(training["training_seconds"]),
        "best_epoch": training["best_epoch"],
        "best_valid_loss": training["best_valid_loss"],
        "last_valid_loss": training["last_valid_loss"],
        "last_train_loss": training["last_train_loss"],
        **{
            f"{split} {scale}": scores[split][scale]
            for scale in ("BLEU", "BLEU of tokens")
            for split in ("valid", "test")
        },
    }


def read_score(folder: Path, split: str) -> dict:
    return json.loads((folder / f"{split}.json").read_text("utf-8"))


def p_value(baseline: Path, run: Path) -> float:
    """Return the p-value of a paired bootstrap test of the test BLEU of two run folders."""
    systems = [(folder.name, read_lines(folder / "test.hyp")) for folder in (baseline, run)]
    _, scores = PairedTest(systems, {"BLEU": BLEU()}, [read_lines(run / "test.ref")], test_type="bs")()
    return float(scores["BLEU"][1].p_value)


def as_markdown(results: dict) -> str:
    """Return three tables: training, detokenized BLEU, and BLEU of tokens beside the paper's."""
    training, detokenized, of_tokens = [], [], []
    for row in results["systems"]:
        name = row["system"]
        losses = ("best_valid_loss", "last_valid_loss", "last_train_loss")
        training.append(
            [
                name,
                "" if row["rho"] is None else f"{row['rho']:g}",
                str(row["epochs"]),
                time_ratio(results, row),
                *(spread(row, key, 3) for key in losses),
            ]
        )
        p_values = ", ".join(f"{run['p_value']:.3f}" for run in row["runs"] if "p_value" in run)
        detokenized.append([name, *(spread(row, f"{split} BLEU") for split in ("valid", "test")), p_values])
        paper = [shown(score) for score in PAPER.get(name, (None, None))]
        of_tokens.append(
            [name, *(spread(row, f"{split} BLEU of tokens") for split in ("valid", "test")), *paper]
        )
    seeds = ", ".join(str(run["seed"]) for run in results["systems"][0]["runs"])
    counts = results["sentences"]
    return "\n".join(
        [
            f"Set-up `{results['setup']}`, seeds {seeds}; mean ± standard deviation over the seeds. "
            "Losses in bits per token, the best by epoch and the last.\n",
            markdown_table(
                [
                    *("optimizer", "rho", "epochs", "time / Adam's"),
                    *("best validation loss", "last validation loss", "last training loss"),
                ],
                training,
            ),
            f"BLEU by sacrebleu, {counts['valid']} validation and {counts['test']} test sentences, "
            f"`{results['signature']}`; p of a paired bootstrap test against Adam's run of the same seed:\n",
            markdown_table(["optimizer", "validation", "test", "p of each seed"], detokenized),
            "BLEU of tokens, as fairseq-generate prints it, beside that of the paper on IWSLT'14 (its Table "
            "5). Not comparable with the figures above, nor, on another corpus, with the paper's:\n",
            markdown_table(
                ["optimizer", "validation", "test", "paper: validation", "paper: test"], of_tokens
            ),
        ]
    )


def spread(row: dict, key: str, digits: int = 2) -> str:
    """Return mean ± standard deviation of a figure."""
    return shown(row["mean"][key], row["sd"][key], digits)


def time_ratio(results: dict, row: dict) -> str:
    """Return the training time of *row* divided by the baseline's."""
    seconds = results["systems"][0]["mean"]["training_seconds"]
    return shown(row["mean"]["training_seconds"] / seconds if seconds else None)


if __name__ == "__main__":
    main()
