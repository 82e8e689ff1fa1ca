"""The tests, tables and picture of trial.py, from what its runs have found so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from data_prep.languages import NAMES
from recipes.reporter import format_number, markdown_table, mean_and_sd
from recipes.translation.significance import t_interval

METRICS = ("BLEU", "chrF2")
#: By corpus, system and seed, what record.py wrote of a run.
Found = Mapping[tuple[str, str, int], dict]
#: A system and which of its weights: those of the best checkpoint, or the averaged ones.
Scored = tuple[str, str]

#: The differences of the plan: what it calls each, or we do, and of which systems it is.
TESTS: dict[str, tuple[str, Scored, Scored]] = {
    "D1": ("momentum averaged - Adam averaged", ("momentum", "averaged"), ("adam", "averaged")),
    "D2": ("momentum averaged - random averaged", ("momentum", "averaged"), ("random", "averaged")),
    "averaging": ("Adam averaged - Adam", ("adam", "averaged"), ("adam", "best")),
    "random": ("random averaged - Adam averaged", ("random", "averaged"), ("adam", "averaged")),
    "momentum": ("momentum - Adam", ("momentum", "best"), ("adam", "best")),
}
DECIDING = ("D1", "D2")
#: Below so many seeds of each language, nothing is decided.
LEAST_SEEDS = 3


def difference(
    found: Found, corpus: str, seed: int, pair: tuple[Scored, Scored], metric: str
) -> float | None:
    """Return by how much the first of *pair* scores more with the same seed; None where one is not made."""
    scores = []
    for system, weights in pair:
        run = found.get((corpus, system, seed))
        if run is None:
            return None
        scores.append(run["test"][weights][metric])
    return scores[0] - scores[1]


def compare(found: Found, seeds: Mapping[str, Sequence[int]], pair: tuple[Scored, Scored]) -> dict:
    """Return the tests of a difference over languages, and its verdict by the plan.

    Args:
        found: All runs that are made.
        seeds: Of each language, which is the name of its corpus too.
        pair: Whose difference.

    Returns:
        By metric, the interval over the seeds of each language, `over languages` (of the means of these) and
        `over languages and seeds`. The last two take the seeds that all languages have. Of the whole, their
        number `seeds`, and `verdict`: "won", "lost", "uncertain", or None below three seeds.
    """
    result: dict = {}
    for metric in METRICS:
        values = {
            language: [difference(found, language, seed, pair, metric) for seed in of_language]
            for language, of_language in seeds.items()
        }
        rows = [row for row in zip(*values.values()) if None not in row]
        result[metric] = {
            "languages": {
                language: t_interval([value for value in each if value is not None])
                for language, each in values.items()
            },
            "over languages": t_interval([sum(column) / len(column) for column in zip(*rows)]),
            "over languages and seeds": t_interval([value for row in rows for value in row]),
        }
    return {"seeds": len(rows), "verdict": verdict(result, len(rows)), **result}


def title(name: str, test: dict) -> str:
    return f"{name}: {test['difference']}" if name in DECIDING else test["difference"]


def verdict(result: dict, seeds: int) -> str | None:
    if seeds < LEAST_SEEDS:
        return None
    lower = [result["BLEU"][over]["interval"][0] for over in ("over languages", "over languages and seeds")]
    if min(lower) > 0 and result["chrF2"]["over languages and seeds"]["mean"] > 0:
        return "won"
    return "lost" if max(lower) <= 0 else "uncertain"


def name_of_table(language: str) -> str:
    """Return the name of the table of :func:`system_rows` of 8,000 pairs."""
    return f"{language}, 8,000 pairs"


def system_rows(found: Found, corpus: str, systems: Iterable[str], seeds: Sequence[int]) -> list[dict]:
    """Return, of each system, the scores over its seeds and their differences from those of Adam."""
    rows = []
    for system in systems:
        made = [seed for seed in seeds if (corpus, system, seed) in found]
        if not made:
            continue
        row: dict = {"system": system, "seeds": made}
        for weights in ("best", "averaged"):
            for metric in METRICS:
                scores = [found[corpus, system, seed]["test"][weights][metric] for seed in made]
                mean, sd = mean_and_sd(scores)
                pair = (system, weights), ("adam", weights)
                paired = (difference(found, corpus, seed, pair, metric) for seed in made)
                row[f"{weights} {metric}"] = {
                    "mean": mean,
                    "sd": sd,
                    "against Adam": t_interval([value for value in paired if value is not None]),
                }
        rows.append(row)
    return rows


def interval_text(interval: dict) -> str:
    if interval["mean"] is None:
        return ""
    bounds = interval["interval"]
    return f"{interval['mean']:+.2f}" + (f" ({bounds[0]:+.2f} to {bounds[1]:+.2f})" if bounds else "")


def tests_table(tests: dict[str, dict]) -> str:
    """Return the table of all differences over languages."""
    rows = []
    for name, test in tests.items():
        for metric in METRICS:
            decided = (test["verdict"] or "") if metric == "BLEU" and name in DECIDING else ""
            over = [test[metric][key] for key in ("over languages", "over languages and seeds")]
            cells = [interval_text(each) for each in (*test[metric]["languages"].values(), *over)]
            rows.append([title(name, test), metric, str(test["seeds"]), *cells, decided])
    languages = next(iter(tests.values()))["BLEU"]["languages"]
    header = ["", "", "seeds of all", *languages, "over languages", "over languages and seeds", "verdict"]
    return markdown_table(header, rows)


def systems_table(rows: Sequence[dict]) -> str:
    """Return the table of the systems of one corpus."""
    cells = []
    for row in rows:
        line = [row["system"], ", ".join(map(str, row["seeds"]))]
        for column in ("best BLEU", "averaged BLEU", "averaged chrF2"):
            of_adam = row["system"] == "adam"
            line.append(format_number(row[column]["mean"], row[column]["sd"]))
            line.append("" if of_adam else interval_text(row[column]["against Adam"]))
        cells.append(line)
    against = "against Adam's"
    header = ["", "seeds", "BLEU", against, "BLEU, averaged", against, "chrF2, averaged", against]
    return markdown_table(header, cells)


def draw(tests: dict[str, dict]) -> Figure:
    """Return a figure of the deciding differences: a row for each language, then the pooled ones."""
    figure = Figure(figsize=(5 * len(DECIDING) + 1, 4), layout="constrained")
    panels = figure.subplots(1, len(DECIDING), sharex=True, sharey=True)
    for axes, name in zip(panels, DECIDING):
        axes.axvline(0, color="grey", linewidth=1)
        for number, metric in enumerate(METRICS):
            test = tests[name][metric]
            rows = {
                **test["languages"],
                "over languages": test["over languages"],
                "over languages and seeds": test["over languages and seeds"],
            }
            for place, each in enumerate(rows.values()):
                if each["mean"] is None:
                    continue
                low, high = each["interval"] or (each["mean"], each["mean"])
                axes.errorbar(
                    each["mean"],
                    place + 0.2 * number - 0.1,
                    xerr=[[each["mean"] - low], [high - each["mean"]]],
                    fmt="os"[number],
                    color=f"C{number}",
                    capsize=3,
                    label=metric if place == len(rows) - 1 else None,
                )
        axes.axhline(len(test["languages"]) - 0.5, color="grey", linewidth=0.5)
        axes.set_yticks(range(len(rows)), [NAMES.get(name, name) for name in rows])
        axes.set(title=title(name, tests[name]), xlabel="difference in the test set, 95 % t interval")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure
