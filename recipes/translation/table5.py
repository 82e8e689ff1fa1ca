"""Table 5 of the ASAM paper: Adam, SAM and ASAM on German-English translation, over several seeds.

    python -m recipes.translation.table5 embedded|iwslt14 [--seeds 1 2 3] [--jobs N] [--rho ...]
                                         [fairseq-train flags]

`iwslt14` is the paper's experiment (Section 5.3), for a GPU; `embedded` takes two hours on 2 cores. For SAM
and ASAM, rho is the one with the highest validation BLEU among the runs of the first seed (rho_search.py).
Because they take two passes, there is Adam with twice the epochs as well. Only the runs in the table
translate the test set. Writes table5.{json,md}, rho_search.{json,png} and, of the first seed, curves.png to
OUT (default: runs/translation/SETTING), beside the folders of the runs. Run again, it does what is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from fairseq_asam.files import whole
from recipes.translation.collect import training_figures
from recipes.translation.curves import save_curves
from recipes.translation.experiment import Experiment, Run
from recipes.translation.files import read_lines
from recipes.translation.rho_search import (
    best_rho,
    experiment_of,
    experiment_parser,
    search,
    validation_point,
    write,
)
from recipes.translation.settings import SETTINGS

#: Validation and test BLEU of tokens in Table 5 of the paper.
PAPER = {"Adam": (35.34, 34.86), "Adam+SAM": (35.52, 34.78), "Adam+ASAM": (35.66, 35.02)}


def main() -> None:
    parser = experiment_parser("Table 5 of the ASAM paper, over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    args, flags = parser.parse_known_args()
    experiment = experiment_of(args, flags)
    epochs = args.epochs or SETTINGS[args.setting].epochs
    seeds = list(dict.fromkeys(args.seeds))

    points = [
        point
        for optimizer in ("sam", "asam")
        for point in search(experiment, optimizer, args.rho, epochs, seeds[0])
    ]
    sam, asam = (best_rho(points, optimizer) for optimizer in ("sam", "asam"))
    systems = {
        "Adam": [Run("adam", epochs, seed) for seed in seeds],
        "Adam, twice the epochs": [Run("adam", 2 * epochs, seed) for seed in seeds],
        "Adam+SAM": [Run("sam", epochs, seed, sam) for seed in seeds],
        "Adam+ASAM": [Run("asam", epochs, seed, asam) for seed in seeds],
    }
    experiment.complete([run for runs in systems.values() for run in runs], ["valid", "test"])

    results = collect(experiment, systems)
    with whole(experiment.out / "table5.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    with whole(experiment.out / "table5.md") as file:
        file.write_text(as_markdown(results), "utf-8")
    points += [validation_point(experiment, run) for run in systems["Adam"]]
    points += [
        validation_point(experiment, run)
        for name in ("Adam+SAM", "Adam+ASAM")
        for run in systems[name]
        if run.seed != seeds[0]
    ]
    write(experiment.out, points)
    save_curves(
        experiment.out / "curves.png", {name: experiment.folder(runs[0]) for name, runs in systems.items()}
    )
    print(as_markdown(results), end="")


def collect(experiment: Experiment, systems: dict[str, list[Run]]) -> dict:
    """Return what the table shows: for each system its runs, each with its figures, and means and standard
    deviations of these over the seeds. Losses are in bits per token; `p_value` is that of a paired bootstrap
    test of test BLEU against the baseline's run of the same seed, the first system being the baseline.
    """
    baseline = next(iter(systems.values()))
    rows = []
    for name, runs in systems.items():
        figures = [run_figures(experiment, run) for run in runs]
        if runs is not baseline:
            for run, first, figure in zip(runs, baseline, figures):
                figure["p_value"] = p_value(experiment.folder(first), experiment.folder(run))
        measured = [key for key, value in figures[0].items() if isinstance(value, float) and key != "p_value"]
        rows.append(
            {
                "system": name,
                "rho": runs[0].rho,
                "epochs": runs[0].epochs,
                "runs": [{"seed": run.seed, **figure} for run, figure in zip(runs, figures)],
                "mean": {key: mean(figure[key] for figure in figures) for key in measured},
                "sd": {
                    key: stdev(figure[key] for figure in figures) if len(runs) > 1 else None
                    for key in measured
                },
            }
        )
    return {
        "setting": experiment.setting,
        "flags": list(experiment.flags),
        "sentences": {
            split: len(read_lines(experiment.folder(baseline[0]) / f"{split}.ref"))
            for split in ("valid", "test")
        },
        "signature": read_score(experiment.folder(baseline[0]), "test")["signature"],
        "systems": rows,
    }


def run_figures(experiment: Experiment, run: Run) -> dict:
    folder = experiment.folder(run)
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
    """The p-value of a paired bootstrap test of the test BLEU of two run folders."""
    systems = [(folder.name, read_lines(folder / "test.hyp")) for folder in (baseline, run)]
    _, scores = PairedTest(systems, {"BLEU": BLEU()}, [read_lines(run / "test.ref")], test_type="bs")()
    return float(scores["BLEU"][1].p_value)


def as_markdown(results: dict) -> str:
    """Return three tables: training, detokenized BLEU, and BLEU of tokens beside the paper's."""
    systems = results["systems"]
    seeds = ", ".join(str(run["seed"]) for run in systems[0]["runs"])
    seconds = systems[0]["mean"]["training_seconds"]
    lines = [
        f"Setting `{results['setting']}`, seeds {seeds}; mean ± standard deviation over the seeds. "
        "Losses in bits per token, the best by epoch and the last.",
        "",
        "| optimizer | rho | epochs | time / Adam's | best validation loss | last validation loss "
        "| last training loss |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in systems:
        ratio = row["mean"]["training_seconds"] / seconds if seconds else float("nan")
        losses = " | ".join(
            spread(row, key, 3) for key in ("best_valid_loss", "last_valid_loss", "last_train_loss")
        )
        rho = "" if row["rho"] is None else f"{row['rho']:g}"
        lines.append(f"| {row['system']} | {rho} | {row['epochs']} | {ratio:.2f} | {losses} |")
    counts = results["sentences"]
    lines += [
        "",
        f"BLEU by sacrebleu, {counts['valid']} validation and {counts['test']} test sentences, "
        f"`{results['signature']}`; p of a paired bootstrap test against Adam's run of the same seed:",
        "",
        "| optimizer | validation | test | p of each seed |",
        "|:--|--:|--:|--:|",
    ]
    for row in systems:
        p_values = ", ".join(f"{run['p_value']:.3f}" for run in row["runs"] if "p_value" in run)
        scores = " | ".join(spread(row, f"{split} BLEU", 2) for split in ("valid", "test"))
        lines.append(f"| {row['system']} | {scores} | {p_values} |")
    lines += [
        "",
        "BLEU of tokens, as fairseq-generate prints it, beside that of the paper on IWSLT'14 (its Table 5). "
        "Not comparable with the figures above, nor, on another corpus, with the paper's:",
        "",
        "| optimizer | validation | test | paper: validation | paper: test |",
        "|:--|--:|--:|--:|--:|",
    ]
    for row in systems:
        paper = " | ".join(f"{score:.2f}" for score in PAPER.get(row["system"], ())) or " | "
        lines.append(
            f"| {row['system']} | {spread(row, 'valid BLEU of tokens', 2)} "
            f"| {spread(row, 'test BLEU of tokens', 2)} | {paper} |"
        )
    return "\n".join(lines) + "\n"


def spread(row: dict, key: str, digits: int) -> str:
    """Return mean ± standard deviation with so many decimals."""
    sd = row["sd"][key]
    return f"{row['mean'][key]:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


if __name__ == "__main__":
    main()
