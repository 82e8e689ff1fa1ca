"""What the forms of sharpness-aware training buy, and what they cost, in the setting of table5.py.

    python -m recipes.translation.gain_and_cost SETUP [--forms NAME ...] [--seeds 1 2 3] [--search-only]
                                                [--rho 0.1 0.2 ...] [--epochs N [--search-epochs N]]
                                                [--earlier-searches FILE ...] [--jobs N] [fairseq-train flags]

FORMS lists them: SAM and ASAM with two passes for each update, Adam's metric, and forms with fewer passes.
Some have a search over rho of their own, by validation BLEU of the first seed; the others have the rho of SAM
or ASAM. A long training can take rho from a search in shorter ones. `--search-only` ends after the searches,
which leave the test set alone. Adam is the baseline. Systems with one pass stand in the table a second time,
with the weights of their last 5 epochs averaged, which costs nothing. The time of an epoch is that of the
fastest seed, as other work on the machine can only slow it. Writes gain_and_cost.{json,md,png} and
gain_and_cost_search.{json,png} to OUT (default: runs/translation/SETUP), beside the folders of the runs,
which table5.py shares. Run again, it does what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from fairseq_asam.files import write_json
from recipes.reporter import markdown_table, write_figure, write_text
from recipes.translation import gains, rho_search
from recipes.translation.experiment import (
    average_of,
    comparison_arguments,
    comparison_parser,
    complete_systems,
    experiment_run,
)
from recipes.translation.table5 import (
    ABOUT_TIME,
    DIFFERENCE,
    about_scores,
    collect,
    difference,
    spread,
    time_ratio,
)


@dataclass(frozen=True)
class Form:
    """A form of sharpness-aware training.

    Attributes:
        optimizer: What follows --optimizer.
        passes: Forward and backward passes of an update, on average.
        rho_of: The optimizer whose search gives rho; its own if it is None.
    """

    optimizer: str
    passes: float
    rho_of: str | None = None


FORMS = {
    "SAM": Form("sam", 2.0),
    "ASAM": Form("asam", 2.0),
    "Adam's metric": Form("asam --normalization adam", 2.0),
    "late start 0.75, ASAM": Form("asam --ascent-from 0.75", 1.25),
    "late start 0.9, ASAM": Form("asam --ascent-from 0.9", 1.1),
    "late start 0.9, SAM": Form("sam --ascent-from 0.9", 1.1),
    "momentum, SAM": Form("sam --ascent-direction momentum", 1.0),
    "momentum, ASAM": Form("asam --ascent-direction momentum", 1.0),
    "fraction 0.25": Form("asam --ascent-fraction 0.25", 1.25, rho_of="asam"),
    "interval 2": Form("asam --ascent-interval 2", 1.5, rho_of="asam"),
}


def main() -> None:
    parser = comparison_parser("Compare what the forms of sharpness-aware training gain, and what they cost.")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=list(FORMS),
        default=list(FORMS),
        metavar="NAME",
        help=f"forms to train (default: all): {', '.join(map(repr, FORMS))}",
    )
    parser.add_argument("--search-only", action="store_true", help="end after the searches over rho")
    args = comparison_arguments(parser)
    forms = {name: FORMS[name] for name in args.forms}

    rho_from = {name: form.rho_of or form.optimizer for name, form in forms.items()}
    optimizers = dict.fromkeys(rho_from.values())
    points = rho_search.search(args, optimizers, args.seeds[0], args.search_epochs)
    everything = [point for found in points.values() for point in found]
    write_json(args.out / "gain_and_cost_search.json", everything)
    write_figure(args.out / "gain_and_cost_search.png", rho_search.draw(everything))
    if args.search_only:
        return

    systems = {"Adam": [experiment_run(args, "adam", args.epochs, seed) for seed in args.seeds]}
    for name, form in forms.items():
        rho = rho_search.best(points[rho_from[name]])
        systems[name] = [experiment_run(args, form.optimizer, args.epochs, seed, rho) for seed in args.seeds]
    passes = {name: forms[name].passes if name in forms else 1.0 for name in systems}
    averaged = {
        f"{name}, averaged": [average_of(run) for run in runs]
        for name, runs in systems.items()
        if passes[name] == 1.0
    }
    complete_systems(args, systems)
    complete_systems(args, averaged)

    results = collect(args, {**systems, **averaged})
    results["averaged"] = {
        row["system"]: row["against baseline"] for row in collect(args, averaged)["systems"][1:]
    }
    for row in results["systems"]:
        row["passes"] = passes.get(row["system"], 1.0)
    table = as_markdown(results)
    write_json(args.out / "gain_and_cost.json", results)
    write_text(args.out / "gain_and_cost.md", table)
    write_figure(args.out / "gain_and_cost.png", gains.draw(results["systems"]))
    print(table, end="")


def as_markdown(results: dict) -> str:
    """Return the table of cost and quality, and that of averaged weights against Adam's averaged weights."""
    systems = results["systems"]
    seeds = ", ".join(str(run["seed"]) for run in systems[0]["runs"])
    rows = []
    for row in systems:
        trained = "training_seconds" in row
        against = row.get("against baseline", {})
        tested = {metric: difference(against.get(metric)) for metric in ("BLEU", "chrF2")}
        rows.append(
            [
                row["system"],
                "" if row["rho"] is None else f"{row['rho']:g}",
                f"{row['passes']:g}",
                time_ratio(results, row) if trained else "",
                spread(row, "best_valid_loss", 3) if trained else "",
                spread(row, "valid BLEU"),
                *(spread(row, "test BLEU"), *tested["BLEU"]),
                *(spread(row, "test chrF2"), *tested["chrF2"]),
            ]
        )
    header = [
        *("", "rho", "passes", "time / Adam's", "best validation loss"),
        *("validation BLEU", "test BLEU", *DIFFERENCE, "test chrF2", *DIFFERENCE),
    ]
    table = (
        f"Set-up `{results['setup']}`, seeds {seeds}; mean ± standard deviation over the seeds. Passes are "
        f"those of an update, on average. {ABOUT_TIME} Losses in bits per token. {about_scores(results)}\n\n"
        + markdown_table(header, rows)
    )
    if not results["averaged"]:
        return table
    rows = [
        [name, *difference(against["BLEU"]), *difference(against["chrF2"])]
        for name, against in results["averaged"].items()
    ]
    header = ["", *(f"{metric}: {cell}" for metric in ("test BLEU", "test chrF2") for cell in DIFFERENCE)]
    return f"{table}\nAgainst Adam, averaged, by the same tests:\n\n{markdown_table(header, rows)}"


if __name__ == "__main__":
    main()
