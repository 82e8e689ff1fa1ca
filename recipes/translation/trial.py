"""Makes the trial of momentum's direction with averaged weights, by its committed plan.

    python -m recipes.translation.trial [--parts NAME ...] [--systems NAME ...] [--jobs N]
                                        [--at-most N] [fairseq-train flags]

recipes/results/translation/trial/plan.md says what is trained and why. A run is made in a folder of OUT
(default: runs/translation/trial). When it is finished, RESULTS/runs gets a small JSON file, and its
checkpoints are deleted. A run with such a file is not made again, on whatever machine. From these files,
however many there are, the command makes trial.{json,md,png} in RESULTS (default:
recipes/results/translation/trial). Stopped and started again, it goes on with what is missing. With flags of
fairseq-train, other RESULTS must be named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fairseq_asam.files import write_json
from recipes.reporter import write_figure, write_text
from recipes.runner import Run, complete
from recipes.setups import SETUPS, TRIAL_LANGUAGES
from recipes.translation.experiment import AVERAGED, OWN_FLAGS, average_of, refuse_own_flags
from recipes.translation.record import record
from recipes.translation.train import training, watch
from recipes.translation.trial_tables import (
    METRICS,
    TESTS,
    compare,
    draw,
    name_of_table,
    system_rows,
    systems_table,
    tests_table,
)

RESULTS = Path("recipes/results/translation/trial")
GERMAN = Path("recipes/results/translation/libreoffice_8000/gain_and_cost.json")
#: What follows --optimizer.
SYSTEMS = {
    "adam": "adam",
    "momentum": "sam --ascent-direction momentum --rho 0.2",
    "random": "sam --ascent-direction random --rho 0.2",
    "sam": "sam --rho 0.1",
    "asam": "asam --rho 0.05",
    "nadam": "nadam --user-dir recipes/translation/nadam",
}
COMPARED = ("adam", "momentum", "random")
SEEDS = {"fr": (3, 4, 5, 6, 7), **dict.fromkeys(("cs", "ru", "es"), (1, 2, 3, 4, 5))}
#: Of a learning rate that decays to 0.
PEAKS = ("7e-4", "1e-3", "1.5e-3", "2e-3", "3e-3")
DECAY_SEEDS = (3, 4, 5)


@dataclass(frozen=True)
class Planned:
    """A run of the plan.

    Attributes:
        corpus: What the name of its file begins with.
        setup: One of recipes/setups.py.
        system: One of :data:`SYSTEMS`.
        seed: Of the run.
        flags: Further flags of fairseq-train, separated by spaces.
    """

    corpus: str
    setup: str
    system: str
    seed: int
    flags: str = ""

    @property
    def name(self) -> str:
        return f"{self.corpus}-{self.system}-{self.seed}"


def languages(results: Path) -> Iterator[Planned]:
    """Yield part 1: the seeds one by one, each in all languages, so that these have equally many."""
    for seeds in zip(*(SEEDS[language] for language in TRIAL_LANGUAGES)):
        for language, seed in zip(TRIAL_LANGUAGES, seeds):
            for system in COMPARED:
                yield Planned(language, f"libreoffice_8000_{language}", system, seed)


def controls(results: Path) -> Iterator[Planned]:
    """Yield part 2: the controls in German, beside runs that an earlier experiment has made."""
    for seed in (1, 2, 3, 4, 5):
        for system in ("nadam", "random"):
            yield Planned("de", "libreoffice_8000", system, seed)


def decaying(system: str, peak: str, seed: int) -> Planned:
    flags = f"--lr-scheduler polynomial_decay --total-num-update UPDATES --lr {peak}"
    return Planned(f"fr_decay_{peak}", "libreoffice_8000_fr", system, seed, flags)


def peaks(results: Path) -> Iterator[Planned]:
    """Yield the search of part 3 for the peak of a learning rate that decays to 0."""
    for peak in PEAKS:
        yield decaying("adam", peak, DECAY_SEEDS[0])


def decay(results: Path) -> Iterator[Planned]:
    """Yield the rest of part 3, or nothing before its peak is known."""
    if peak := best_peak(results):
        searched = set(peaks(results))
        for seed in DECAY_SEEDS:
            runs = (decaying(system, peak, seed) for system in (*COMPARED, "sam", "asam"))
            yield from (run for run in runs if run not in searched)


def pairs(results: Path) -> Iterator[Planned]:
    """Yield part 4: all pairs of German."""
    for seed in (1, 2, 3):
        for system in COMPARED:
            yield Planned("de_35561", "libreoffice_35561", system, seed)


def large(results: Path) -> Iterator[Planned]:
    """Yield part 5: the paper's model, on a GPU."""
    for seed in (1, 2):
        for system in ("adam", "momentum", "asam"):
            half_precision = "--fp16" if torch.cuda.is_available() else ""
            yield Planned("de_large", "libreoffice_large_16000", system, seed, half_precision)


#: In the order in which they are made. Each is given the folder of results.
PARTS: dict[str, Callable[[Path], Iterator[Planned]]] = {
    "languages": languages,
    "controls": controls,
    "peaks": peaks,
    "decay": decay,
    "pairs": pairs,
    "large": large,
}
#: How many runs they have. Those of a decay are not known before its peak.
SIZES = {"languages": 60, "controls": 10, "peaks": 5, "decay": 14, "pairs": 9, "large": 6}
ON_A_CPU = [name for name in PARTS if name != "large"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the trial of momentum's direction with averaged weights, by its plan.",
        epilog="Other flags go to every fairseq-train.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=ON_A_CPU,
        metavar="NAME",
        help=f"of {', '.join(PARTS)} (default: all but large, which needs a GPU)",
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=list(SYSTEMS),
        default=list(SYSTEMS),
        metavar="NAME",
        help=f"of {', '.join(SYSTEMS)} (default: all of each part)",
    )
    parser.add_argument("--data", type=Path, help="a corpus folder in place of those of the set-ups")
    parser.add_argument("--out", type=Path, default=Path("runs/translation/trial"), help="for the trainings")
    parser.add_argument("--results", type=Path, default=RESULTS, help="for what they found")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--at-most", type=int, metavar="N", help="end after N runs; 0 makes the tables alone")
    args, args.flags = parser.parse_known_args()
    refuse_own_flags(args.flags, *OWN_FLAGS)
    if args.flags and args.results == RESULTS:
        sys.exit(
            f"trial.py: with {' '.join(args.flags)} these are no runs of the plan: "
            "name another folder after --results."
        )
    with_gpu = torch.cuda.is_available() or "--cpu" in args.flags
    if "large" in args.parts and args.at_most != 0 and not with_gpu:
        sys.exit("trial.py: the part large needs a GPU, and none was found: name other parts after --parts.")
    left = sys.maxsize if args.at_most is None else args.at_most
    for name in args.parts:
        planned = [each for each in PARTS[name](args.results) if each.system in args.systems]
        left -= make(args, planned, left)
    write_tables(args.results)


def make(args: argparse.Namespace, planned: Iterable[Planned], at_most: int) -> int:
    """Make the runs that have no file of results, or the first of them, and return how many."""
    missing = [each for each in planned if not result_file(args.results, each).exists()][:at_most]
    if not missing:
        return 0
    runs = [run_of(args, each) for each in missing]
    complete(runs, args.jobs, watch)
    for each, run in zip(missing, runs):
        if not result_file(args.results, each).exists():  # made before, and its file was lost
            record(run.folder, result_file(args.results, each))
    return len(runs)


def result_file(results: Path, planned: Planned) -> Path:
    return results / "runs" / f"{planned.name}.json"


def run_of(args: argparse.Namespace, planned: Planned) -> Run:
    """Return the run that trains, averages, translates the test set with both, and writes its file."""
    data = SETUPS[planned.setup].folder(args.data)
    optimizer, *form = SYSTEMS[planned.system].split()
    flags = ["--seed", str(planned.seed), "--keep-last-epochs", str(AVERAGED)]
    flags += [*form, *planned.flags.split(), *args.flags]
    trained = training(planned.setup, optimizer, data, args.out / planned.name, flags)
    average = average_of(trained)
    module = [sys.executable, "-m"]
    score = [*module, "recipes.translation.score", str(data)]
    commands = [
        *trained.commands,
        *average.commands,
        [*score, str(trained.folder)],
        [*score, str(average.folder)],
        [*module, "recipes.translation.record", str(trained.folder), str(result_file(args.results, planned))],
    ]
    return Run(trained.folder, trained.options, commands)


def write_tables(results: Path) -> None:
    """Write and print the tests and tables of the runs that are made."""
    planned = {name: list(part(results)) for name, part in PARTS.items()}
    made = {name: sum(result_file(results, each).exists() for each in part) for name, part in planned.items()}
    found = {
        (each.corpus, each.system, each.seed): result
        for part in planned.values()
        for each in part
        if (result := read_result(results, each))
    }
    found.update(german_results())
    tests = {
        name: {"difference": difference, **compare(found, SEEDS, pair)}
        for name, (difference, *pair) in TESTS.items()
    }
    tables = {
        name_of_table(language): system_rows(found, language, COMPARED, SEEDS[language])
        for language in TRIAL_LANGUAGES
    }
    tables[name_of_table("de")] = system_rows(found, "de", (*COMPARED, "nadam"), (1, 2, 3, 4, 5))
    if peak := best_peak(results):
        end = {PEAKS[0]: ", the lowest tried,", PEAKS[-1]: ", the highest tried,"}.get(peak, "")
        tables[f"fr, 8,000 pairs, a learning rate that decays from {peak}{end} to 0"] = system_rows(
            found, decaying("adam", peak, DECAY_SEEDS[0]).corpus, (*COMPARED, "sam", "asam"), DECAY_SEEDS
        )
    tables["de, 35,561 pairs"] = system_rows(found, "de_35561", COMPARED, (1, 2, 3))
    tables["de, 35,561 pairs, transformer_iwslt_de_en"] = system_rows(
        found, "de_large", ("adam", "momentum", "asam"), (1, 2)
    )
    counts = {name: {"made": made[name], "planned": SIZES[name]} for name in planned}
    found_so_far = {"runs": counts, "tests": tests, "tables": tables}
    write_json(results / "trial.json", found_so_far)
    text = as_markdown(**found_so_far)
    write_text(results / "trial.md", text)
    write_figure(results / "trial.png", draw(tests))
    print(text, end="")


def as_markdown(runs: dict, tests: dict, tables: dict) -> str:
    """Return how many *runs* are made, the tests, and a table of each corpus that has runs."""
    missing = {name: each["planned"] - each["made"] for name, each in runs.items()}
    sections = [
        f"{sum(missing.values())} runs of [the plan](plan.md) are missing: "
        f"{', '.join(f'{count} of the part {name}' for name, count in missing.items())}.\n",
        "Differences in the test set with their 95 % t intervals. The last two of these take the seeds that "
        "all languages have. By the plan, a difference is won if both of them in BLEU, and the mean in chrF2 "
        "too, are above 0. It is lost if neither of them in BLEU is above 0, and otherwise uncertain.\n",
        tests_table(tests),
    ]
    for name, rows in tables.items():
        if rows:
            sections += [f"{name}, mean ± standard deviation over the seeds:\n", systems_table(rows)]
    return "\n".join(sections)


def german_results() -> dict[tuple[str, str, int], dict]:
    """Return the scores of Adam and momentum in German, which an earlier experiment has made."""
    rows = {
        row["system"]: {run["seed"]: run for run in row["runs"]}
        for row in json.loads(GERMAN.read_text("utf-8"))["systems"]
    }
    return {
        ("de", system, seed): {
            "test": {
                "best": {metric: run[f"test {metric}"] for metric in METRICS},
                "averaged": {metric: rows[f"{name}, averaged"][seed][f"test {metric}"] for metric in METRICS},
            }
        }
        for system, name in (("adam", "Adam"), ("momentum", "momentum, SAM"))
        for seed, run in rows[name].items()
    }


def read_result(results: Path, planned: Planned) -> dict | None:
    """Return what a run found; None if it is not finished."""
    file = result_file(results, planned)
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def best_peak(results: Path) -> str | None:
    """Return the peak of the highest validation BLEU; None while one of them has not been tried."""
    found = {peak: read_result(results, decaying("adam", peak, DECAY_SEEDS[0])) for peak in PEAKS}
    if None in found.values():
        return None

    def best_bleu(peak: str) -> float:
        return max(epoch["validation BLEU"] for epoch in found[peak]["epochs"])

    return max(PEAKS, key=best_bleu)


if __name__ == "__main__":
    main()
