"""What the forms of ASAM with less than two passes buy: translation quality against training time.

    python -m recipes.translation.fewer_passes SETUP [--rho 0.5] [--seeds 1 2 3] [--jobs N]
                                               [fairseq-train flags]

Trains Adam, ASAM, ASAM with --ascent-fraction 0.5, 0.25 and 0.125, and with --ascent-interval 2 and 5, these
with the reused component at its own length and at LookSAM's (--ascent-reuse 0.7). All have one rho: the only
one given, or else the best of ASAM itself on validation BLEU. Times can be compared only if nothing else uses
the machine. Writes fewer_passes.{json,md,png} to OUT (default: runs/translation/SETUP), beside the folders of
the runs. Run again, it does what is missing.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from fairseq_asam.files import write_json
from recipes.reporter import markdown_table, write_figure, write_text
from recipes.translation.experiment import (
    complete_and_score,
    experiment_arguments,
    experiment_parser,
    experiment_run,
)
from recipes.translation.rho_search import best, search
from recipes.translation.table5 import collect, spread, time_ratio

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
    parser = experiment_parser("Translation quality of Adam and the forms of ASAM against training time.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    args = experiment_arguments(parser)
    seeds = list(dict.fromkeys(args.seeds))
    rho = best(search(args, "asam", seeds[0]))

    systems = {"Adam": [experiment_run(args, "adam", args.epochs, seed) for seed in seeds]}
    for name, form in FORMS.items():
        systems[name] = [experiment_run(args, "asam", args.epochs, seed, rho, form) for seed in seeds]
    # Go seed by seed, so that a change on the machine meets all forms alike.
    every = [run for runs in zip(*systems.values()) for run in runs]
    complete_and_score(args.data, every, ["valid", "test"], args.jobs)

    results = collect(args, systems)
    table = as_markdown(results)
    write_json(args.out / "fewer_passes.json", results)
    write_text(args.out / "fewer_passes.md", table)
    write_figure(args.out / "fewer_passes.png", draw(results))
    print(table, end="")


def as_markdown(results: dict) -> str:
    """Return the table of time and quality."""
    systems = results["systems"]
    seeds = ", ".join(str(run["seed"]) for run in systems[0]["runs"])
    rows = [
        [
            row["system"],
            spread(row, "training_seconds", 0),
            time_ratio(results, row),
            *(spread(row, key, 3 if key == "best_valid_loss" else 2) for key in COLUMNS),
        ]
        for row in systems
    ]
    return (
        f"Set-up `{results['setup']}`, ASAM with rho {systems[1]['rho']:g}, seeds {seeds}; mean ± "
        f"standard deviation over the seeds. Losses in bits per token; `{results['signatures'][0]}`.\n\n"
        + markdown_table(["", "seconds of training", "ratio to Adam", *COLUMNS.values()], rows)
    )


def draw(results: dict) -> Figure:
    """Return a figure with a panel for each measure of quality, over the time of training.

    Bars are standard deviations. Forms with less than half of the baseline's validation BLEU would squeeze
    the others; they are named above.
    """
    figure = Figure(figsize=(5 * len(COLUMNS), 4.5), layout="constrained")
    panels = figure.subplots(1, len(COLUMNS))
    systems, least = results["systems"], results["systems"][0]["mean"]["valid BLEU"] / 2
    drawn = [row for row in systems if row["mean"]["valid BLEU"] >= least]
    for axes, (key, label) in zip(panels, COLUMNS.items()):
        for number, row in enumerate(drawn):
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
    if absent := [f"{row['system']} ({spread(row, 'valid BLEU', 1)})" for row in systems if row not in drawn]:
        figure.suptitle("not shown, by validation BLEU: " + "; ".join(absent), fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


if __name__ == "__main__":
    main()
