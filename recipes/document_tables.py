"""The tables of results in the Markdown files, printed from the JSON files of recipes/results.

documents.py prints those of TABLES, by name. WHOLE has the pages that the commands of experiments write
beside their JSON.
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from data_prep.languages import NAMES
from recipes.image_classification import table
from recipes.reporter import format_number, markdown_table, mean_and_sd, table_of
from recipes.setups import TRIAL_LANGUAGES
from recipes.translation import compare, gain_and_cost, gains, table5, trial, trial_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"


def image_table(corner: str, found: dict) -> str:
    """Return the page of a table of recipes/image_classification."""
    cells = {(cell["row"], cell["column"]): cell for cell in found["cells"]}
    return table.as_markdown(corner, cells, found.get("paper"), found["note"])


#: Who printed the pages of results, by their places in RESULTS. A printer takes what the JSON file holds.
WHOLE: dict[str, Callable[[Any], str]] = {
    "translation/*/table5.md": table5.as_markdown,
    "translation/*/gain_and_cost.md": gain_and_cost.as_markdown,
    "translation/trial/trial.md": lambda found: trial.as_markdown(**found),
    "quickstart/results.md": compare.as_markdown,
    "image_classification/table2*.md": functools.partial(image_table, "model"),
    "image_classification/table6*.md": functools.partial(image_table, "noise rate"),
    "image_classification/figure4*.md": functools.partial(image_table, "rho"),
    "image_classification/rho_search*.md": functools.partial(image_table, "rho"),
}


def read(file: str) -> Any:
    return json.loads((RESULTS / file).read_text("utf-8"))


def systems_of(length: str) -> list[dict]:
    """Return the systems that were trained for *length*, the name of a folder of results."""
    files = [RESULTS / "translation" / length / f"{table}.json" for table in ("table5", "gain_and_cost")]
    return gains.read([file for file in files if file.exists()])


def by(key: str, rows: Sequence[dict]) -> dict[str, dict]:
    return {row[key]: row for row in rows}


def rho_text(rho: float | None) -> str:
    """Return *rho* for a table: nothing without one."""
    return "" if rho is None else f"{rho:g}"


def first_screen() -> str:
    """Averaged weights against Adam's averaged weights: four languages, and German with 30 and 60 epochs."""
    found = read("translation/trial/trial.json")
    systems = [systems_of(length) for length in ("libreoffice_8000", "libreoffice_8000_60_epochs")]
    german = [by("system", rows)["Adam, averaged"] for rows in systems]
    forms = [gains.with_trial(gains.forms(systems[0]), found), gains.forms(systems[1])]
    short, long = ({form.name: form for form in each} for each in forms)
    tables = [found["tables"][trial_tables.name_of_table(language)] for language in TRIAL_LANGUAGES]
    scores = [fmean(by("system", rows)["adam"]["averaged BLEU"]["mean"] for rows in tables)]
    scores += [row["mean"]["test BLEU"] for row in german]
    rho = {row["system"]: row["rho"] for row in systems[0]}
    rho[gains.RANDOM] = rho["SAM, momentum"]  # by the trial's plan
    rows = [["Adam", "", "1.00", *map(format_number, scores)]]
    for name in ("SAM, momentum", gains.RANDOM, "SAM", "ASAM", "Adam, twice the epochs"):
        averaged = [short[name].in_trial, short[name].averaged, long[name].averaged if name in long else None]
        rows.append([name, rho_text(rho[name]), format_number(short[name].time), *map(gains.text, averaged)])
    header = ["", "rho", "time / Adam's", "four languages, 30 epochs"]
    return markdown_table([*header, *(f"German, {row['epochs']} epochs" for row in german)], rows)


def translation_systems(length: str) -> str:
    """The systems of a folder of results: training, test BLEU, and the difference from Adam."""
    header = ["", "rho", "time / Adam's", "best validation loss", "test BLEU", *table5.DIFFERENCE]
    found = systems_of(length)
    seconds = found[0]["training_seconds"]
    rows = []
    for row in sorted(found, key=lambda row: row["system"].endswith(gains.AVERAGED)):
        trained = "training_seconds" in row
        rows.append(
            [
                row["system"],
                rho_text(row["rho"]),
                format_number(row["training_seconds"] / seconds) if trained else "",
                format_number(row["mean"]["best_valid_loss"], digits=3) if trained else "",
                format_number(row["mean"]["test BLEU"]),
                *table5.difference(row["against baseline"]["BLEU"] if "against baseline" in row else None),
            ]
        )
    return markdown_table(header, rows)


def trial_by_language() -> str:
    """The differences of the trial in test BLEU, with averaged weights: each language, then all together."""
    columns = {
        "momentum - Adam": "D1",
        "momentum - random": "D2",
        "random - Adam": "random",
        "Adam averaged - not averaged": "averaging",
    }
    tests = read("translation/trial/trial.json")["tests"]
    bleu = [tests[name]["BLEU"] for name in columns.values()]
    rows = [
        [NAMES[language], *(each["languages"][language] for each in bleu)] for language in TRIAL_LANGUAGES
    ]
    rows += [
        [over, *(each[over] for each in bleu)] for over in ("over languages", "over languages and seeds")
    ]
    return markdown_table(
        ["", *columns], ([name, *map(trial_tables.interval_text, row)] for name, *row in rows)
    )


def late_start() -> str:
    """Best validation loss with each seed: Adam, SAM, and SAM in the last tenth of the epochs."""
    runs = read("translation/libreoffice_8000/late_start.json")["systems"]
    kinds = {
        "Adam": "adam-30-epochs",
        "SAM, rho 0.1": "sam-30-epochs-rho-0.1",
        "SAM, late start 0.9, rho 0.2": "sam-30-epochs-rho-0.2-ascent-from-0.9",
    }
    losses = {run["name"]: format_number(run["best_valid_loss"], digits=3) for run in runs}
    seeds = range(1, 6)
    rows = [[kind, *(losses[f"{name}-seed-{seed}"] for seed in seeds)] for kind, name in kinds.items()]
    return markdown_table(["seed", *map(str, seeds)], rows)


def rho_search() -> str:
    """Validation BLEU over rho, seed 1."""
    points = read("translation/libreoffice_8000/gain_and_cost_search.json")
    values = sorted({point["rho"] for point in points})
    bleu = {(point["optimizer"], point["rho"]): format_number(point["BLEU"]) for point in points}
    optimizers = dict.fromkeys(point["optimizer"] for point in points)
    rows = [[f"`{o}`", *(bleu.get((o, rho), "") for rho in values)] for o in optimizers]
    return markdown_table(["rho", *(f"{rho:g}" for rho in values)], rows)


def dropped() -> str:
    """Validation BLEU of the forms that were dropped after seed 1."""
    points = read("translation/libreoffice_8000/dropped.json")
    return table_of(points, ("", "`{optimizer}`"), ("rho", "{rho:g}"), ("validation BLEU", "{BLEU:.2f}"))


def adams_metric() -> str:
    """Adam's metric beside Adam: loss and BLEU on the validation set, with three seeds."""
    runs = by("name", read("translation/libreoffice_8000/adams_metric.json")["systems"])
    seeds = range(1, 4)
    rows = []
    for name in ("adam-30-epochs", "asam-30-epochs-rho-0.005-normalization-adam"):
        of_seeds = [runs[f"{name}-seed-{seed}"] for seed in seeds]
        losses = [format_number(run["best_valid_loss"], digits=3) for run in of_seeds]
        kind = "Adam's metric, rho 0.005" if "normalization" in name else "Adam"
        rows.append([kind, *losses, *(format_number(run["BLEU"]["score"]) for run in of_seeds)])
    header = ["", *(f"loss, seed {seed}" for seed in seeds), *(f"BLEU, seed {seed}" for seed in seeds)]
    return markdown_table(header, rows)


def confidence_of_models() -> str:
    """How sure some models of the search are, and how often they are right."""
    models = by("run", read("translation/libreoffice_8000/confidence.json")["models"])
    kinds = {
        "Adam": "adam-30-epochs",
        "SAM, rho 0.05": "sam-30-epochs-rho-0.05",
        "SAM, rho 0.2": "sam-30-epochs-rho-0.2",
        "ASAM, rho 0.05": "asam-30-epochs-rho-0.05",
        "ASAM, rho 0.5": "asam-30-epochs-rho-0.5",
    }
    rows = [{"kind": kind, **models[f"{run}-seed-1"]} for kind, run in kinds.items()]
    figures = ("loss", "accuracy", "confidence", "entropy")
    return table_of(rows, ("", "{kind}"), *((figure, f"{{{figure}:.3f}}") for figure in figures))


def flatness(length: str) -> str:
    """The sharpness of trained models beside their BLEU, over the runs of each system."""
    systems: dict[str, list[dict]] = {}
    for run in read(f"translation/{length}/flatness.json")["runs"]:
        systems.setdefault(run["system"], []).append(run)
    rows = []
    for system, runs in systems.items():
        bleu = format_number(*mean_and_sd([run["BLEU"] for run in runs]))
        measures = (
            mean_and_sd([run["measures"][f"{kind}, rho 0.1"] for run in runs])
            for kind in ("sharpness", "adaptive sharpness")
        )
        rows.append([system, bleu, *(format_number(*each, digits=4) for each in measures)])
    return markdown_table(["", "validation BLEU", "sharpness", "adaptive sharpness"], rows)


def libreoffice_large() -> str:
    """The paper's model on a GPU, after ten minutes."""
    rows = []
    for name, run in read("translation/libreoffice_large/momentum.json").items():
        losses = {
            int(epoch["epoch"]): epoch["valid_loss"] for epoch in run["epochs"] if "valid_loss" in epoch
        }
        scored = run["validation with beam 5"]
        rows.append(
            [
                name,
                *(format_number(losses.get(epoch), digits=3) for epoch in (10, 15)),
                str(scored["after epoch"]),
                *(format_number(scored[weights]["BLEU"]) for weights in ("last", "mean of the last five")),
            ]
        )
    header = [
        "",
        "loss after epoch 10",
        "after epoch 15",
        "last epoch",
        "its BLEU",
        "BLEU, last five averaged",
    ]
    return markdown_table(header, rows)


def step_cost() -> str:
    """The cost of an update of fairseq-train on a CPU, with a second call beside it."""
    first, second = (read(f"benchmark/step_cost{call}.json")["models"] for call in ("", "_second_call"))
    calls = [by("optimizer", call[size]["seconds"]) for size in (0, 1) for call in (first, second)]
    rows = [
        {**row, "ratios": [call[row["optimizer"]]["ratio"] for call in calls]} for row in joined(first[0])
    ]
    return table_of(
        rows,
        ("", "`{optimizer}`"),
        ("passes", "{passes:g}"),
        ("large model", "{ratios[0]:.2f}"),
        ("second call", "{ratios[1]:.2f}"),
        ("small model", "{ratios[2]:.2f}"),
        ("second call", "{ratios[3]:.2f}"),
        ("copies of the weights", "{copies:.2f}"),
    )


def joined(found: dict) -> list[dict]:
    """Return the rows of each optimizer's time in *found*, with the figures of its memory."""
    memory = by("optimizer", found["memory"])
    return [{**row, **memory[row["optimizer"]]} for row in found["seconds"]]


def gpu_step_cost() -> str:
    """The same on a GPU; momentum's direction was measured on another day."""
    calls = read("benchmark/gpu/step_cost.json")
    ratios: list[dict] = [{}, {}]
    for call in calls:
        for model in call["models"]:
            ratios[model["model"] == "small"].update(by("optimizer", model.get("seconds", [])))
    copies = by("optimizer", next(m["memory"] for call in calls for m in call["models"] if "memory" in m))
    rows = [
        [
            f"`{name}`",
            *(format_number(each[name]["ratio"]) for each in ratios),
            format_number(copies.get(name, {}).get("copies")),
        ]
        for name in ratios[0]
    ]
    return markdown_table(["", "large model", "small model", "copies of the weights"], rows)


def image_step_cost() -> str:
    """The time of an update on images, divided by SGD's."""
    epochs = read("benchmark/image_step_cost.json")["epochs"]
    ratios = {(row["model"], row["optimizer"]): format_number(row["ratio"]) for row in epochs}
    models, optimizers = (list(dict.fromkeys(row[key] for row in epochs)) for key in ("model", "optimizer"))
    rows = [[f"`{name}`", *(ratios[model, name] for model in models)] for name in optimizers]
    return markdown_table(["", *models], rows)


def huggingface_step_cost() -> str:
    """The time of an update of HuggingFace's Trainer, divided by the stock one's."""
    return table_of(
        read("benchmark/huggingface_step_cost.json")["trainers"],
        ("", "{trainer}"),
        ("time / stock's", "{ratio:.2f}"),
        ("quartiles", "{low:.2f} to {high:.2f}"),
    )


def perturbations(file: str) -> str:
    """The milliseconds of perturbing and restoring the weights, over several calls."""
    calls: dict[str, list[dict]] = {}
    for call in read(file):
        calls.setdefault(call["device"], []).append(by("name", call["figures"]))

    def span(values: list[float], digits: int) -> str:
        return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values))))

    rows = []
    for name in next(iter(calls.values()))[0]:
        row = [name]
        for of_device in calls.values():
            figures = [call[name] for call in of_device]
            row += [span([f["median_ms"] for f in figures], 1), span([f["ratio"] for f in figures], 2)]
        rows.append(row)
    header = [f"{device}: {cell}" for device in calls for cell in ("ms", "ratio")]
    return markdown_table(["", *header], rows)


def profile() -> str:
    """Where the time of an update goes."""
    stages = read("benchmark/profile.json")["stages"]
    return table_of(stages, ("stage", "{stage}"), ("ms", "{ms:.0f}"), ("share", "{share:.1%}"))


def sharded_step() -> str:
    """An update with weights in shards over two processes."""
    rows = [{**row, "MB": row["peak_bytes"] / 1e6} for row in joined(read("benchmark/sharded_step.json"))]
    return table_of(
        rows,
        ("", "`{optimizer}`"),
        ("time / adam's", "{ratio:.2f}"),
        ("all-reduce, bytes", "{sent_bytes[all-reduce]}"),
        ("peak memory, MB", "{MB:.0f}"),
        ("copies of the shard", "{copies:.2f}"),
    )


def launches() -> str:
    """The operations of one perturbation on an accelerator, beside an earlier version."""
    rows = [
        {
            **version,
            "which": "this version" if version["name"] == "this" else f"commit {version['commit']}",
            "median_ms": version["median_us"] / 1e3,
            "minimum_ms": version["minimum_us"] / 1e3,
        }
        for version in read("benchmark/launches.json")["versions"]
    ]
    return table_of(
        rows,
        ("", "{which}"),
        ("operations", "{operations}"),
        ("median, ms", "{median_ms:.2f}"),
        ("fastest, ms", "{minimum_ms:.2f}"),
    )


def faults() -> str:
    """The faults that runs of one and of two workers survived."""
    runs = [read(f"faults/{name}.json")["rows"] for name in ("faults", "faults-2-workers")]
    survived = [collections.Counter() for _ in runs]
    for counts, rows in zip(survived, runs):
        for row in rows:
            counts[row["fault"], row["place"]] += row["survived"]
    both = survived[1] | survived[0]
    kinds = [kind for kind, _ in both]
    ordered = sorted(both, key=lambda fault: kinds.index(fault[0]))  # in the order of the first of each kind
    cells = [[*fault, *(str(counts[fault] or "") for counts in survived)] for fault in ordered]
    total = ["**all**", "", *(f"**{sum(counts.values())}**" for counts in survived)]
    return markdown_table(["fault", "where the worker was", "1 worker", "2 workers"], [*cells, total])


TABLES: dict[str, Callable[[], str]] = {
    "first-screen": first_screen,
    "translation-30-epochs": functools.partial(translation_systems, "libreoffice_8000"),
    "translation-60-epochs": functools.partial(translation_systems, "libreoffice_8000_60_epochs"),
    "translation-120-epochs": functools.partial(translation_systems, "libreoffice_8000_120_epochs"),
    "trial": trial_by_language,
    "late-start": late_start,
    "rho-search": rho_search,
    "dropped": dropped,
    "adams-metric": adams_metric,
    "confidence": confidence_of_models,
    "flatness-30-epochs": functools.partial(flatness, "libreoffice_8000"),
    "flatness-60-epochs": functools.partial(flatness, "libreoffice_8000_60_epochs"),
    "libreoffice-large": libreoffice_large,
    "launches": launches,
    "step-cost": step_cost,
    "gpu-step-cost": gpu_step_cost,
    "image-step-cost": image_step_cost,
    "huggingface-step-cost": huggingface_step_cost,
    "perturbation": functools.partial(perturbations, "benchmark/perturbation.json"),
    "gpu-perturbation": functools.partial(perturbations, "benchmark/gpu/perturbation.json"),
    "profile": profile,
    "sharded-step": sharded_step,
    "faults": faults,
}
