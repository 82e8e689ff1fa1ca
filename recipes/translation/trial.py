"""Makes the trial of the advice to use momentum's direction with averaged weights, by its committed plan.

    python -m recipes.translation.trial [--parts NAME ...] [--systems NAME ...] [--jobs N] [--tables-only]
                                        [fairseq-train flags]

recipes/results/translation/trial/plan.md says what is trained and why. A run is made in a folder of OUT
(default: runs/translation/trial). When it is finished, RESULTS/runs gets a small JSON file, and its
checkpoints are deleted. A run with such a file is not made again, on whatever machine. From these files,
however many there are, the command makes trial.{json,md,png} in RESULTS (default:
recipes/results/translation/trial). Stopped and started again, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.runner import Run, complete
from recipes.setups import SETUPS, TRIAL_LANGUAGES
from recipes.translation.experiment import AVERAGED, average_of
from recipes.translation.record import record
from recipes.translation.train import training, watch

RESULTS = Path("recipes/results/translation/trial")
#: What follows --optimizer.
SYSTEMS = {
    "adam": "adam",
    "momentum": "sam --ascent-direction momentum --rho 0.2",
    "random": "sam --ascent-direction random --rho 0.2",
    "sam": "sam --rho 0.1",
    "asam": "asam --rho 0.05",
    "nadam": "nadam --user-dir recipes/translation/nadam",
}
THREE = ("adam", "momentum", "random")
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
            for system in THREE:
                yield Planned(language, f"help_8000_{language}", system, seed)


def controls(results: Path) -> Iterator[Planned]:
    """Yield part 2: the controls in German, beside runs that an earlier experiment has made."""
    for seed in (1, 2, 3, 4, 5):
        for system in ("random", "nadam"):
            yield Planned("de", "help_8000", system, seed)


def decaying(system: str, peak: str, seed: int) -> Planned:
    flags = f"--lr-scheduler polynomial_decay --total-num-update UPDATES --lr {peak}"
    return Planned(f"fr_decay_{peak}", "help_8000_fr", system, seed, flags)


def peaks(results: Path) -> Iterator[Planned]:
    """Yield the search of part 3 for the peak of a learning rate that decays to 0."""
    for peak in PEAKS:
        yield decaying("adam", peak, DECAY_SEEDS[0])


def decay(results: Path) -> Iterator[Planned]:
    """Yield part 3, or nothing before its peak is known."""
    if peak := best_peak(results):
        for seed in DECAY_SEEDS:
            for system in (*THREE, "sam", "asam"):
                yield decaying(system, peak, seed)


def pairs(results: Path) -> Iterator[Planned]:
    """Yield part 4: all pairs of German."""
    for seed in (1, 2, 3):
        for system in THREE:
            yield Planned("de_35561", "help_35561", system, seed)


#: In the order in which they are made. Each is given the folder of results.
PARTS: dict[str, Callable[[Path], Iterator[Planned]]] = {
    "languages": languages,
    "controls": controls,
    "peaks": peaks,
    "decay": decay,
    "pairs": pairs,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the trial of momentum's direction with averaged weights, by its plan.",
        epilog="Other flags go to every fairseq-train.",
        allow_abbrev=False,
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--data", type=Path, help="a corpus folder in place of those of the set-ups")
    parser.add_argument("--out", type=Path, default=Path("runs/translation/trial"), help="for the trainings")
    parser.add_argument("--results", type=Path, default=RESULTS, help="for what they found")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--tables-only", action="store_true", help="train nothing")
    args, args.flags = parser.parse_known_args()
    if not args.tables_only:
        for name in args.parts:
            planned = [each for each in PARTS[name](args.results) if each.system in args.systems]
            make(args, planned)


def make(args: argparse.Namespace, planned: Sequence[Planned]) -> None:
    """Make the runs that have no file of results."""
    missing = []
    for each in planned:
        file = result_file(args.results, each)
        if not file.exists():
            run = run_of(args, each, file)
            if run.is_finished():  # its file was lost
                record(run.folder, file)
            else:
                missing.append(run)
    complete(missing, args.jobs, watch)


def result_file(results: Path, planned: Planned) -> Path:
    return results / "runs" / f"{planned.name}.json"


def run_of(args: argparse.Namespace, planned: Planned, file: Path) -> Run:
    """Return the run that trains, averages, translates the test set with both, and writes *file*."""
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
        [*module, "recipes.translation.record", str(trained.folder), str(file)],
    ]
    return Run(trained.folder, trained.options, commands)


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
