"""What each form of sharpness-aware training gains over Adam in test BLEU, as a picture.

    python -m recipes.translation.gains OUT.png FILE... [--trial trial.json]

A FILE is what table5.py or gain_and_cost.py wrote: table5.json or gain_and_cost.json. Several files of one
experiment go into one picture. Each form has a row with two differences and its training time: its best
checkpoint is compared with Adam's best checkpoint, and its averaged weights with Adam's averaged weights. The
bars are 95 % t intervals over the seeds. With what trial.py wrote, momentum has a third difference, that of
averaged weights in the trial's languages, and a random epsilon has a row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from recipes.reporter import format_number, write_figure
from recipes.translation import trial_tables
from recipes.translation.significance import t_interval

AVERAGED = ", averaged"
#: The field of a form, and how the picture shows it: label and colour.
KINDS = {
    "alone": ("best checkpoint against Adam's best checkpoint", "C7"),
    "averaged": ("averaged weights against Adam's averaged weights", "C0"),
}
IN_TRIAL = ("averaged weights, four other languages together", "C1")
#: Between two kinds of a form, where forms are 1 apart.
GAP = 0.25
RANDOM = "SAM, random ε (control)"
#: What trial.json calls the gain of a form over Adam.
TESTS = {"SAM, momentum": "D1", RANDOM: "random"}


@dataclass(frozen=True)
class Gain:
    """The mean over the seeds of a difference in test BLEU, and its 95 % t interval (None with one seed)."""

    mean: float
    interval: list[float] | None


@dataclass(frozen=True)
class Form:
    """What a form gains over Adam.

    Attributes:
        name: As in the tables.
        time: The time of its training, divided by Adam's, None if not measured.
        alone: The gain of its best checkpoint over Adam's best checkpoint, None if not measured.
        averaged: The gain of its averaged weights over Adam's averaged weights, None if not measured.
        in_trial: The same over the languages and seeds of the trial.
    """

    name: str
    time: float | None
    alone: Gain | None
    averaged: Gain | None
    in_trial: Gain | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what each form gains over Adam.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the PNG to write")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="table5.json, gain_and_cost.json")
    parser.add_argument("--trial", type=Path, metavar="FILE", help="trial.json, to draw its languages too")
    args = parser.parse_args()
    trial = json.loads(args.trial.read_text("utf-8")) if args.trial else None
    write_figure(args.out, draw(read(args.files), trial))


def read(files: Sequence[Path]) -> list[dict]:
    """Return the systems of the tables in *files*, each once.

    Raises:
        SystemExit: The files are of different experiments.
    """
    systems: dict[str, dict] = {}
    for file in files:
        for row in json.loads(file.read_text("utf-8"))["systems"]:
            name = name_in_tables(row["system"])
            if systems.setdefault(name, {**row, "system": name})["runs"] != row["runs"]:
                sys.exit(
                    f"gains.py: '{file}' has other runs of '{name}' than '{files[0]}': draw one at a time."
                )
    return list(systems.values())


def name_in_tables(system: str) -> str:
    """Return the name of a *system* as a reader looks for it: "SAM, momentum" for "momentum, SAM".

    table5.py says "Adam+SAM", as the paper does, and gain_and_cost.py "SAM".
    """
    name = system.removesuffix(AVERAGED).removeprefix("Adam+")
    form, _, optimizer = name.rpartition(", ")
    if form and optimizer in ("SAM", "ASAM"):
        name = f"{optimizer}, {form}"
    return name + (AVERAGED if system.endswith(AVERAGED) else "")


def gain_of(interval: dict) -> Gain:
    """Return *interval*, as t_interval() and trial.json have it, as a gain."""
    return Gain(interval["mean"], interval["interval"])


def text(gain: Gain | None) -> str:
    """Return the text of *gain* in a table: nothing if it was not measured."""
    return "" if gain is None else trial_tables.interval_text(vars(gain))


def forms(systems: Sequence[dict]) -> list[Form]:
    """Return the forms among *systems*, those of the shortest training first."""
    by_name = {row["system"]: row for row in systems}

    def gain(name: str, over: str) -> Gain | None:
        if name not in by_name or over not in by_name:
            return None
        runs = zip(by_name[name]["runs"], by_name[over]["runs"])
        return gain_of(t_interval([run["test BLEU"] - other["test BLEU"] for run, other in runs]))

    seconds = by_name["Adam"]["training_seconds"]
    found = [
        Form(
            name,
            row["training_seconds"] / seconds,
            gain(name, "Adam"),
            gain(name + AVERAGED, "Adam" + AVERAGED),
        )
        for name, row in by_name.items()
        if name != "Adam" and not name.endswith(AVERAGED)
    ]
    return sorted(found, key=lambda form: form.time)


def with_trial(found: Sequence[Form], trial: dict) -> list[Form]:
    """Return the forms *found* and a random epsilon, with their gains in *trial*, what trial.json holds."""
    german = {row["system"]: row for row in trial["tables"][trial_tables.name_of_table("de")]}
    of_random = {}
    # Of fewer seeds than Adam's, the interval would be wider than the picture.
    if "random" in german and german["random"]["seeds"] == german["adam"]["seeds"]:
        for weights in ("best", "averaged"):
            of_random[weights] = gain_of(german["random"][f"{weights} BLEU"]["against Adam"])
    random = Form(RANDOM, None, of_random.get("best"), of_random.get("averaged"))
    gains = {
        name: gain_of(trial["tests"][test]["BLEU"]["over languages and seeds"])
        for name, test in TESTS.items()
    }
    names = [form.name for form in found]
    place = names.index("SAM, momentum") + 1 if "SAM, momentum" in names else 0
    rows = (*found[:place], random, *found[place:])
    return [replace(form, in_trial=gains.get(form.name)) for form in rows]


def draw(systems: Sequence[dict], trial: dict | None = None) -> Figure:
    """Return a figure with a row for each of the :func:`forms` among *systems*, and with those of *trial*."""
    found = forms(systems) if trial is None else with_trial(forms(systems), trial)
    kinds = KINDS if trial is None else {**KINDS, "in_trial": IN_TRIAL}
    rows = dict(enumerate(reversed(found)))
    figure = Figure(figsize=(8, 1.3 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for number, (kind, (label, color)) in enumerate(kinds.items()):
        offset = GAP * ((len(kinds) - 1) / 2 - number)
        gains = {height + offset: getattr(form, kind) for height, form in rows.items() if getattr(form, kind)}
        means = [gain.mean for gain in gains.values()]
        reach = [
            [abs(bound - gain.mean) for bound in gain.interval or [gain.mean] * 2] for gain in gains.values()
        ]
        style = {"fmt": "o", "color": color, "capsize": 3, "label": label}
        axes.errorbar(means, list(gains), xerr=list(zip(*reach)) or None, **style)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
    axes.text(1.02, len(rows) - 0.3, "time / Adam's", **beside)
    for height, form in rows.items():
        axes.text(1.02, height, format_number(form.time), **beside)
    axes.set_yticks(list(rows), [form.name for form in rows.values()])
    axes.set_ylim(-0.5, len(rows) - 0.5)
    adam = next(row for row in systems if row["system"] == "Adam")
    about = f"{adam['epochs']} epochs, {len(adam['runs'])} seeds, 95 % t intervals"
    axes.set_xlabel(f"test BLEU, difference from Adam ({about})")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines[["top", "left", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=1, frameon=False)
    return figure


if __name__ == "__main__":
    main()
