"""What the experiments share: their options, the trainings they consist of, and how these are made."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.options import at_least_1
from recipes.runner import Run, complete
from recipes.setups import SETUPS
from recipes.translation.train import training, watch

#: How many of its last epochs a training keeps to average their weights.
AVERAGED = 5
#: What every experiment gives to each of its trainings.
OWN_FLAGS = ("--optimizer", "--seed", "--save-dir", "--keep-last-epochs")


def experiment_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all experiments share."""
    parser = argparse.ArgumentParser(
        description=description, epilog="Other flags go to every fairseq-train.", allow_abbrev=False
    )
    parser.add_argument("setup", choices=list(SETUPS), help="corpus, model and training")
    parser.add_argument(
        "--data", type=Path, help="corpus folder of data_prep (default: the set-up's in data/)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/translation/SETUP)")
    parser.add_argument("--epochs", type=at_least_1, help="epochs of each run (default: the set-up's)")
    parser.add_argument(
        "--rho", type=float, nargs="+", help="values of rho to search (default: the set-up's)"
    )
    parser.add_argument(
        "--earlier-searches",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="rho_search.json of earlier searches; their values are not run again for the same seed",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    return parser


def experiment_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options with their defaults, and as `flags` those for fairseq-train."""
    args, flags = parser.parse_known_args()
    refuse_own_flags(flags, *OWN_FLAGS, "--max-epoch")
    args.flags = flags
    args.data = SETUPS[args.setup].folder(args.data)
    args.out = args.out or Path("runs/translation", args.setup)
    args.epochs = args.epochs or SETUPS[args.setup].epochs
    return args


def refuse_own_flags(flags: Sequence[str], *own: str) -> None:
    """Refuse those of *flags*, for every fairseq-train, that an experiment gives each of its trainings.

    Raises:
        SystemExit: One of *flags* is one of *own*.
    """
    for flag in (word.partition("=")[0] for word in flags):
        if flag in own:
            sys.exit(
                f"The experiment itself gives {flag} to each training: use its own options (see --help), or "
                f"drop {flag}."
            )


def comparison_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options of an experiment that compares systems over several seeds."""
    parser = experiment_parser(description)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="seeds (default: 1 2 3 4 5)"
    )
    parser.add_argument(
        "--search-epochs",
        type=at_least_1,
        help="epochs of each run of the search over rho (default: --epochs)",
    )
    return parser


def comparison_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options with their defaults, each seed once."""
    args = experiment_arguments(parser)
    args.seeds = list(dict.fromkeys(args.seeds))
    args.search_epochs = args.search_epochs or args.epochs
    return args


def experiment_run(
    args: argparse.Namespace,
    optimizer: str,
    epochs: int,
    seed: int,
    rho: float | None = None,
) -> Run:
    """Return one training of an experiment. *optimizer* is what follows --optimizer of fairseq-train."""
    optimizer, *form = optimizer.split()
    own = [*([] if rho is None else ["--rho", f"{rho:g}"]), *form]
    name = "-".join([optimizer, f"{epochs}-epochs", *(word.lstrip("-") for word in own), f"seed-{seed}"])
    flags = ["--max-epoch", str(epochs), "--seed", str(seed), "--keep-last-epochs", str(AVERAGED)]
    return training(args.setup, optimizer, args.data, args.out / name, [*flags, *own, *args.flags])


def average_of(run: Run) -> Run:
    """Return the run that averages the weights of the last epochs of the training *run*."""
    last = min(AVERAGED, run.options["epochs"])
    folder = run.folder / "average"
    out = str(folder / "checkpoint_best.pt")
    command = [sys.executable, "-m", "fairseq_asam.averaging", str(run.folder), out]
    return Run(folder, {**run.options, "averaged epochs": last}, [[*command, "--last", str(last)]])


def complete_and_score(data: Path, runs: Sequence[Run], splits: Sequence[str], jobs: int) -> None:
    """Complete *runs*, trainings on the corpus in *data* or averages, and translate *splits* with each."""
    complete(runs, jobs, watch)
    score = [sys.executable, "-m", "recipes.translation.score", str(data)]
    scoring = []
    for run, split in itertools.product(runs, splits):
        options = {**run.options, "split": split}
        scoring.append(Run(run.folder / split, options, [[*score, str(run.folder), "--split", split]]))
    complete(scoring, jobs)


def complete_systems(args: argparse.Namespace, systems: Mapping[str, Sequence[Run]]) -> None:
    """Complete and score the runs of *systems* on both held-out splits.

    It goes seed by seed: an early stop leaves whole seeds, and a change on the machine meets all systems
    alike.
    """
    every = [run for runs in zip(*systems.values()) for run in runs]
    complete_and_score(args.data, every, ["valid", "test"], args.jobs)
