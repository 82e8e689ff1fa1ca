"""The tables of results in the Markdown files, printed from the JSON files of recipes/results.

documents.py prints those of TABLES, by name. WHOLE has the pages that the commands of experiments write
beside their JSON.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipes.faults import faults
from recipes.image_classification import table
from recipes.reporter import markdown_table, shown
from recipes.translation import compare, flatness, gain_and_cost, gains, table5

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
    "translation/*/flatness.md": lambda found: flatness.as_markdown(
        found["runs"], found["split"], found["tau"]
    ),
    "quickstart/results.md": compare.as_markdown,
    "faults/*.md": faults.as_markdown,
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


def first_screen() -> str:
    """Averaged weights against Adam's averaged weights, after 30 and after 60 epochs."""
    systems = [systems_of(length) for length in ("help_8000", "help_8000_60_epochs")]
    adam = [by("system", rows)["Adam, averaged"] for rows in systems]
    forms = [{form.name: form for form in gains.forms(rows)} for rows in systems]
    rows = [["Adam", "1.00", *(shown(row["mean"]["test BLEU"]) for row in adam)]]
    for name in ("SAM, momentum", "SAM", "ASAM", "Adam, twice the epochs"):
        averaged = [each[name].averaged for each in forms]
        cells = [f"{gain.difference:+.2f} ({table5.between(gain.interval)})" for gain in averaged]
        rows.append([name, shown(forms[0][name].time), *cells])
    return markdown_table(["", "training time", *(f"{row['epochs']} epochs" for row in adam)], rows)


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
                "" if row["rho"] is None else f"{row['rho']:g}",
                shown(row["training_seconds"] / seconds) if trained else "",
                shown(row["mean"]["best_valid_loss"], digits=3) if trained else "",
                shown(row["mean"]["test BLEU"]),
                *table5.difference(row["against baseline"]["BLEU"] if "against baseline" in row else None),
            ]
        )
    return markdown_table(header, rows)


def late_start() -> str:
    """Best validation loss with each seed: Adam, SAM, and SAM in the last tenth of the epochs."""
    runs = read("translation/help_8000/late_start.json")["systems"]
    kinds = {
        "Adam": "adam-30-epochs",
        "SAM, rho 0.1": "sam-30-epochs-rho-0.1",
        "SAM, late start 0.9, rho 0.2": "sam-30-epochs-rho-0.2-ascent-from-0.9",
    }
    losses = {run["name"]: shown(run["best_valid_loss"], digits=3) for run in runs}
    seeds = range(1, 6)
    rows = [[kind, *(losses[f"{name}-seed-{seed}"] for seed in seeds)] for kind, name in kinds.items()]
    return markdown_table(["seed", *map(str, seeds)], rows)


def rho_search() -> str:
    """Validation BLEU over rho, seed 1."""
    points = read("translation/help_8000/gain_and_cost_search.json")
    values = sorted({point["rho"] for point in points})
    bleu = {(point["optimizer"], point["rho"]): shown(point["BLEU"]) for point in points}
    optimizers = dict.fromkeys(point["optimizer"] for point in points)
    rows = [[f"`{o}`", *(bleu.get((o, rho), "") for rho in values)] for o in optimizers]
    return markdown_table(["rho", *(f"{rho:g}" for rho in values)], rows)


def dropped() -> str:
    """Validation BLEU of the forms that were dropped after seed 1."""
    points = read("translation/help_8000/dropped.json")
    rows = [[f"`{point['optimizer']}`", f"{point['rho']:g}", shown(point["BLEU"])] for point in points]
    return markdown_table(["", "rho", "validation BLEU"], rows)


def adams_metric() -> str:
    """Adam's metric beside Adam: loss and BLEU on the validation set, with three seeds."""
    runs = by("name", read("translation/help_8000/adams_metric.json")["systems"])
    seeds = range(1, 4)
    rows = []
    for name in ("adam-30-epochs", "asam-30-epochs-rho-0.005-normalization-adam"):
        of_seeds = [runs[f"{name}-seed-{seed}"] for seed in seeds]
        losses = [shown(run["best_valid_loss"], digits=3) for run in of_seeds]
        kind = "Adam's metric, rho 0.005" if "normalization" in name else "Adam"
        rows.append([kind, *losses, *(shown(run["BLEU"]["score"]) for run in of_seeds)])
    header = ["", *(f"loss, seed {seed}" for seed in seeds), *(f"BLEU, seed {seed}" for seed in seeds)]
    return markdown_table(header, rows)


def confidence_of_models() -> str:
    """How sure some models of the search are, and how often they are right."""
    models = by("run", read("translation/help_8000/confidence.json")["models"])
    rows = [
        [
            kind,
            *(
                shown(models[f"{run}-seed-1"][f], digits=3)
                for f in ("loss", "accuracy", "confidence", "entropy")
            ),
        ]
        for kind, run in {
            "Adam": "adam-30-epochs",
            "SAM, rho 0.05": "sam-30-epochs-rho-0.05",
            "SAM, rho 0.2": "sam-30-epochs-rho-0.2",
            "ASAM, rho 0.05": "asam-30-epochs-rho-0.05",
            "ASAM, rho 0.5": "asam-30-epochs-rho-0.5",
        }.items()
    ]
    return markdown_table(["", "loss", "accuracy", "confidence", "entropy"], rows)


def help_large() -> str:
    """The paper's model on a GPU, after ten minutes."""
    rows = []
    for name, run in read("translation/help_large/momentum.json").items():
        losses = {
            int(epoch["epoch"]): epoch["valid_loss"] for epoch in run["epochs"] if "valid_loss" in epoch
        }
        scored = run["validation with beam 5"]
        rows.append(
            [
                name,
                *(shown(losses.get(epoch), digits=3) for epoch in (10, 15)),
                str(scored["after epoch"]),
                *(shown(scored[weights]["BLEU"]) for weights in ("last", "mean of the last five")),
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
    ratios = [by("optimizer", call[size]["seconds"]) for size in (0, 1) for call in (first, second)]
    copies = by("optimizer", first[0]["memory"])
    rows = [
        [
            f"`{name}`",
            f"{ratios[0][name]['passes']:g}",
            *(shown(of_call[name]["ratio"]) for of_call in ratios),
            shown(copies[name]["copies"]),
        ]
        for name in ratios[0]
    ]
    header = [
        "",
        "passes",
        "large model",
        "second call",
        "small model",
        "second call",
        "copies of the weights",
    ]
    return markdown_table(header, rows)


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
            *(shown(each[name]["ratio"]) for each in ratios),
            shown(copies.get(name, {}).get("copies")),
        ]
        for name in ratios[0]
    ]
    return markdown_table(["", "large model", "small model", "copies of the weights"], rows)


def image_step_cost() -> str:
    """The time of an update on images, divided by SGD's."""
    epochs = read("benchmark/image_step_cost.json")["epochs"]
    ratios = {(row["model"], row["optimizer"]): shown(row["ratio"]) for row in epochs}
    models, optimizers = (list(dict.fromkeys(row[key] for row in epochs)) for key in ("model", "optimizer"))
    rows = [[f"`{name}`", *(ratios[model, name] for model in models)] for name in optimizers]
    return markdown_table(["", *models], rows)


def huggingface_step_cost() -> str:
    """The time of an update of HuggingFace's Trainer, divided by the stock one's."""
    rows = [
        [row["trainer"], shown(row["ratio"]), f"{shown(row['low'])} to {shown(row['high'])}"]
        for row in read("benchmark/huggingface_step_cost.json")["trainers"]
    ]
    return markdown_table(["", "time / stock's", "quartiles"], rows)


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
    rows = [[stage["stage"], f"{stage['ms']:.0f}", f"{stage['share']:.1%}"] for stage in stages]
    return markdown_table(["stage", "ms", "share"], rows)


def sharded_step() -> str:
    """An update with weights in shards over two processes."""
    found = read("benchmark/sharded_step.json")
    memory = by("optimizer", found["memory"])
    rows = [
        [
            f"`{row['optimizer']}`",
            shown(row["ratio"]),
            str(row["sent_bytes"]["all-reduce"]),
            f"{memory[row['optimizer']]['peak_bytes'] / 1e6:.0f}",
            shown(memory[row["optimizer"]]["copies"]),
        ]
        for row in found["seconds"]
    ]
    return markdown_table(
        ["", "time / adam's", "all-reduce, bytes", "peak memory, MB", "copies of the shard"], rows
    )


def launches() -> str:
    """The operations of one perturbation on an accelerator, beside an earlier version."""
    found = read("benchmark/launches.json")
    rows = [
        [
            "this version" if version["name"] == "this" else f"commit {version['commit']}",
            str(version["operations"]),
            f"{version['median_us'] / 1e3:.2f}",
            f"{version['minimum_us'] / 1e3:.2f}",
        ]
        for version in found["versions"]
    ]
    return markdown_table(["", "operations", "median, ms", "fastest, ms"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "first-screen": first_screen,
    "translation-30-epochs": functools.partial(translation_systems, "help_8000"),
    "translation-60-epochs": functools.partial(translation_systems, "help_8000_60_epochs"),
    "translation-120-epochs": functools.partial(translation_systems, "help_8000_120_epochs"),
    "late-start": late_start,
    "rho-search": rho_search,
    "dropped": dropped,
    "adams-metric": adams_metric,
    "confidence": confidence_of_models,
    "help-large": help_large,
    "launches": launches,
    "step-cost": step_cost,
    "gpu-step-cost": gpu_step_cost,
    "image-step-cost": image_step_cost,
    "huggingface-step-cost": huggingface_step_cost,
    "perturbation": functools.partial(perturbations, "benchmark/perturbation.json"),
    "gpu-perturbation": functools.partial(perturbations, "benchmark/gpu/perturbation.json"),
    "profile": profile,
    "sharded-step": sharded_step,
}
