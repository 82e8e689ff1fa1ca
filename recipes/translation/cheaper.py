"""What the cheaper forms of ASAM buy: translation quality against training time.

    python -m recipes.translation.cheaper embedded|iwslt14 [--rho 0.5] [--seeds 1 2 3] [--jobs N]
                                          [fairseq-train flags]

Trains Adam, ASAM, ASAM with --ascent-fraction 0.5, 0.25 and 0.125, and with --ascent-interval 2 and 5, these
with the reused component at its own length and at LookSAM's (--ascent-reuse 0.7). All have one rho: the only
one given, or else the best of ASAM itself on validation BLEU. Times can be compared only if nothing else uses
the machine. Writes cheaper.{json,md,png} to OUT (default: runs/translation/SETTING), beside the folders of
the runs. Run again, it does what is missing.
"""

from __future__ import annotations

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fairseq_asam.files import whole
from recipes.translation.experiment import Run
from recipes.translation.rho_search import best_rho, experiment_of, experiment_parser, search
from recipes.translation.settings import SETTINGS
from recipes.translation.table5 import collect, spread

FORMS = {
    "ASAM": (),
    **{f"fraction {f}": ("--ascent-fraction", f) for f in ("0.5", "0.25", "0.125")},
    **{f"interval {k}": ("--ascent-interval", k) for k in ("2", "5")},
    **{f"interval {k}, alpha 0.7": ("--ascent-interval", k, "--ascent-reuse", "0.7") for k in ("2", "5")},
}
COLUMNS = {
    "best_valid_loss": "best validation loss",
    "valid BLEU": "validation BLEU",
    "test BLEU": "test BLEU",
}


def main() -> None:
    parser = experiment_parser(
        "Translation quality of Adam, ASAM and its cheaper forms against training time."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    args, flags = parser.parse_known_args()
    experiment = experiment_of(args, flags)
    epochs = args.epochs or SETTINGS[args.setting].epochs
    seeds = list(dict.fromkeys(args.seeds))
    rho = best_rho(search(experiment, "asam", args.rho, epochs, seeds[0]), "asam")

    systems = {"Adam": [Run("adam", epochs, seed) for seed in seeds]}
    for name, form in FORMS.items():
        systems[name] = [Run("asam", epochs, seed, rho, form) for seed in seeds]
    # seed by seed, so that what changes on the machine meets all forms alike
    experiment.complete([run for runs in zip(*systems.values()) for run in runs], ["valid", "test"])

    results = collect(experiment, systems)
    with whole(experiment.out / "cheaper.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    with whole(experiment.out / "cheaper.md") as file:
        file.write_text(as_markdown(results), "utf-8")
    with whole(experiment.out / "cheaper.png") as file:
        draw(results).savefig(file, format="png", dpi=150)
    print(as_markdown(results), end="")


def as_markdown(results: dict) -> str:
    """Return the table of time and quality."""
    systems = results["systems"]
    seeds = ", ".join(str(run["seed"]) for run in systems[0]["runs"])
    baseline = systems[0]["mean"]["training_seconds"]
    lines = [
        f"Setting `{results['setting']}`, ASAM with rho {systems[1]['rho']:g}, seeds {seeds}; mean ± "
        f"standard deviation over the seeds. Losses in bits per token; `{results['signature']}`.",
        "",
        "| | seconds of training | ratio to Adam | " + " | ".join(COLUMNS.values()) + " |",
        "|:--|--:|--:|" + "--:|" * len(COLUMNS),
    ]
    for row in systems:
        ratio = row["mean"]["training_seconds"] / baseline if baseline else float("nan")
        digits = {"best_valid_loss": 3}
        cells = " | ".join(spread(row, key, digits.get(key, 2)) for key in COLUMNS)
        lines.append(f"| {row['system']} | {spread(row, 'training_seconds', 0)} | {ratio:.2f} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(results: dict) -> plt.Figure:
    """A panel for each measure of quality, over the time of training; bars are standard deviations. Forms
    with less than half of the baseline's validation BLEU would squeeze the others, and are named above."""
    figure, panels = plt.subplots(1, len(COLUMNS), figsize=(5 * len(COLUMNS), 4.5), layout="constrained")
    systems, least = results["systems"], results["systems"][0]["mean"]["valid BLEU"] / 2
    shown = [row for row in systems if row["mean"]["valid BLEU"] >= least]
    for axes, (key, label) in zip(panels, COLUMNS.items()):
        for number, row in enumerate(shown):
            axes.errorbar(
                row["mean"]["training_seconds"],
                row["mean"][key],
                xerr=row["sd"]["training_seconds"],
                yerr=row["sd"][key],
                fmt="o",
                capsize=3,
                color=f"C{number}",
                label=row["system"],
            )
        axes.set(xlabel="seconds of training", ylabel=label, xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if absent := [f"{row['system']} ({spread(row, 'valid BLEU', 1)})" for row in systems if row not in shown]:
        figure.suptitle("not shown, by validation BLEU: " + "; ".join(absent), fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


if __name__ == "__main__":
    main()
