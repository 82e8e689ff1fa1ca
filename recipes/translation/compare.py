"""Compares several runs in one table. The first is the baseline.

    python -m recipes.translation.compare OUT RUN RUN... [--split test]

Writes OUT/results.json and OUT/results.md and prints the table. train.py made the runs, and score.py scored
them on the same split.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sacrebleu.significance import PairedTest

from fairseq_asam.files import write_json
from recipes.reporter import format_number, markdown_table, write_text
from recipes.translation.score import METRICS, read_lines, references_of
from recipes.translation.train_log import read_epochs, training_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare several runs in one table.")
    parser.add_argument("out", type=Path, help="folder for results.json and results.md")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of train.py and score.py")
    parser.add_argument("--split", default="test", help="the split that was scored (default: test)")
    args = parser.parse_args()
    for file in (run / name for run in args.runs for name in ("log", f"{args.split}.hyp")):
        if not file.exists():
            sys.exit(f"compare.py: '{file}' is missing: run train.py and score.py for it first.")

    results = compare(args.runs, args.split)
    table = as_markdown(results)
    write_json(args.out / "results.json", results)
    write_text(args.out / "results.md", table)
    print(table, end="")


def compare(runs: list[Path], split: str) -> dict:
    """Return what the table shows.

    Losses are in bits per token. `ci95` is half the width of the 95 % interval around `mean`. What a baseline
    cannot have is None.
    """
    references = references_of(runs, split)
    hypotheses = [(run.name, read_lines(run / f"{split}.hyp")) for run in runs]
    metrics = {name: metric() for name, metric in METRICS.items()}
    signatures, scores = PairedTest(hypotheses, metrics, [references], test_type="bs")()
    systems = [training_figures(run) for run in runs]
    for i, system in enumerate(systems):
        baseline_seconds = systems[0]["training_seconds"]
        system["time_ratio"] = system["training_seconds"] / baseline_seconds if baseline_seconds else None
        for metric in METRICS:
            result = scores[metric][i]
            system[metric] = {
                "score": result.score,
                "mean": float(result.mean),
                "ci95": float(result.ci),
                "p_value": result.p_value,
            }
    return {
        "split": split,
        "sentences": len(references),
        "systems": systems,
        "signatures": {metric: f"{metric}|{signature}" for metric, signature in signatures.items()},
    }


def training_figures(run: Path) -> dict:
    """Return the figures of a run that stand in its log.

    `training_seconds` counts the training steps of every epoch once, in whichever call they ran.
    """
    epochs = read_epochs(run / "log")
    best = min(epochs, key=lambda epoch: epoch["valid_loss"])
    logged = [epoch for epoch in epochs if "train_loss" in epoch]
    return {
        "name": run.name,
        "epochs": len(epochs),
        "training_seconds": training_seconds([run / "log"]),
        "best_valid_loss": best["valid_loss"],
        "best_epoch": int(best["epoch"]),
        "last_valid_loss": epochs[-1]["valid_loss"],
        "last_train_loss": logged[-1]["train_loss"],
    }


def as_markdown(results: dict) -> str:
    """Return the table and the signatures of its scores."""
    baseline = results["systems"][0]["name"]
    header = [
        *("optimizer", "epochs", "training time", f"ratio to {baseline}", "best validation loss (epoch)"),
        *("BLEU, 95 % interval", f"p against {baseline}", "chrF2"),
    ]
    rows = []
    for system in results["systems"]:
        minutes, seconds = divmod(round(system["training_seconds"]), 60)
        bleu, chrf = system["BLEU"], system["chrF2"]
        rows.append(
            [
                system["name"],
                str(system["epochs"]),
                f"{minutes}:{seconds:02}",
                format_number(system["time_ratio"]),
                f"{system['best_valid_loss']:.3f} ({system['best_epoch']})",
                f"{bleu['score']:.2f} ({bleu['mean']:.2f} ± {bleu['ci95']:.2f})",
                format_number(bleu["p_value"], digits=3),
                format_number(chrf["score"]),
            ]
        )
    signatures = "".join(f"- `{signature}`\n" for signature in results["signatures"].values())
    return (
        f"{markdown_table(header, rows)}\n"
        f"Scores on {results['sentences']} sentences of the split `{results['split']}`, by sacrebleu:\n\n"
        f"{signatures}"
    )


if __name__ == "__main__":
    main()
