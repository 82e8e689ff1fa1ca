"""Trains and scores the runs of an experiment, several at a time; what is there already is left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recipes.translation.settings import SETTINGS

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """One training of an optimizer; `rho` is None for adam, `flags` are further ones of fairseq-train."""

    optimizer: str
    epochs: int
    seed: int
    rho: float | None = None
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        rho = "" if self.rho is None else f"-rho-{self.rho:g}"
        flags = "".join(f"-{flag.lstrip('-')}" for flag in self.flags)
        return f"{self.optimizer}-{self.epochs}-epochs{rho}{flags}-seed-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """Runs in one of the settings: where their corpus and their folders are, and how many run at a time."""

    setting: str
    data: Path
    out: Path
    jobs: int = 1
    flags: tuple[str, ...] = ()

    def complete(self, runs: Iterable[Run], splits: Iterable[str]) -> None:
        """Train each of `runs` and score it on each of `splits`. Exits with the status of a run that fails;
        those that go on beside it end first."""
        runs, splits = list(runs), list(splits)
        with ThreadPoolExecutor(self.jobs) as pool:
            outcomes = [pool.submit(self._complete, run, splits) for run in runs]
            for number, (run, outcome) in enumerate(zip(runs, outcomes), 1):
                status = outcome.result()
                if status != 0:
                    pool.shutdown(cancel_futures=True)
                    sys.exit(status)
                print(f"{number} of {len(runs)} runs complete: {run.name}", flush=True)

    def _complete(self, run: Run, splits: list[str]) -> int:
        commands = [self.training(run)]
        for split in splits:
            score = ("-m", "recipes.translation.score", self.data, self.folder(run), "--split", split)
            commands.append([sys.executable, *map(str, score)])
        for command in commands:
            status = subprocess.run(command).returncode
            if status != 0:
                return status
        return 0

    def training(self, run: Run) -> list[str]:
        """The command that trains `run`."""
        rho = () if run.rho is None else ("--rho", f"{run.rho:g}")
        flags = SETTINGS[self.setting].flags(self.data, run.epochs)
        command = (HERE / "train.sh", self.data, self.folder(run), run.optimizer, *flags)
        command += ("--max-epoch", run.epochs, "--seed", run.seed, *rho, *run.flags, *self.flags)
        return list(map(str, command))

    def folder(self, run: Run) -> Path:
        return self.out / run.name
