"""Makes the runs of an experiment: each one once, several at a time, and only what is missing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_asam.files import write_json

LINES_SHOWN_ON_FAILURE = 20
#: What :func:`complete` asks of a run that is under way: the share that is done, and a few words on it.
Watch = Callable[["Run"], "tuple[float, str]"]


@dataclass(frozen=True, eq=False)
class Run:
    """A folder, and what fills it.

    Attributes:
        folder: gets run.json, log (all that the commands print) and what the commands write.
        options: what decides the result. A folder that was begun with others is refused.
        commands: make the result, one after the other. Each goes on where it was stopped.
    """

    folder: Path
    options: dict[str, Any]
    commands: Sequence[Sequence[str]] = field(repr=False)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def is_finished(self) -> bool:
        """Return whether all commands ended well.

        Raises:
            SystemExit: the folder holds a run with other options.
        """
        file = self.folder / "run.json"
        if not file.exists():
            return False
        found = json.loads(file.read_text("utf-8"))
        options = json.loads(json.dumps(self.options))
        for name in dict.fromkeys([*options, *found["options"]]):
            there, wanted = found["options"].get(name), options.get(name)
            if there != wanted:
                sys.exit(f"'{self.folder}' holds a run with {name} {there}, not {wanted}: move it away.")
        return found["finished"]

    def note(self, finished: bool) -> None:
        """Write run.json."""
        write_json(self.folder / "run.json", {"options": self.options, "finished": finished})


def complete(runs: Sequence[Run], jobs: int = 1, watch: Watch | None = None) -> None:
    """Make those of *runs* that are not finished, *jobs* at a time, behind a progress bar.

    The first that fails ends the program with the last lines of its log. Those beside it are stopped, as on
    Ctrl-C and SIGTERM, to go on another time.
    """
    waiting = [run for run in runs if not run.is_finished()]
    bar = tqdm(
        total=len(runs),
        initial=len(runs) - len(waiting),
        unit="run",
        desc="runs",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.3g} of {total} [{elapsed}<{remaining}{postfix}]",
        mininterval=0.5 if sys.stderr.isatty() else 60,
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with bar, contextlib.ExitStack() as stack:
        underway: dict[Run, Iterator[None]] = {}
        try:
            while waiting or underway:
                while waiting and len(underway) < jobs:
                    run = waiting.pop(0)
                    underway[run] = stack.enter_context(contextlib.closing(_steps(run, jobs)))
                for run, steps in list(underway.items()):
                    if next(steps, "ended") == "ended":
                        del underway[run]
                if watch:
                    seen = [watch(run) for run in underway]
                    bar.set_postfix_str("; ".join(words for _, words in seen if words), refresh=False)
                    done = len(runs) - len(waiting) - len(underway) + sum(share for share, _ in seen)
                else:
                    done = len(runs) - len(waiting) - len(underway)
                bar.update(done - bar.n)
                time.sleep(0.1 if underway else 0)
        except KeyboardInterrupt:
            sys.exit("Interrupted; the same command goes on where each run was stopped.")


def _steps(run: Run, jobs: int) -> Iterator[None]:
    """Make *run* little by little; closed early, stop it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with open(run.folder / "lock", "w") as lock, open(run.log, "a", encoding="utf-8") as log:
        # The commands inherit the lock, should they outlive this process.
        while not _locked(lock):
            yield
        if run.is_finished():  # by the process that had the lock
            return
        run.note(finished=False)
        for command in run.commands:
            begin = log.tell()
            process = subprocess.Popen(
                list(command),
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
            )
            try:
                while process.poll() is None:
                    yield
            finally:
                process.terminate()
                process.wait()
            if process.returncode != 0:
                _fail(run, command, process.returncode, begin)
        run.note(finished=True)


def _locked(file: Any) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _fail(run: Run, command: Sequence[str], status: int, begin: int) -> None:
    with open(run.log, encoding="utf-8", errors="replace") as log:
        log.seek(begin)
        sys.stderr.writelines(log.readlines()[-LINES_SHOWN_ON_FAILURE:])
    print(
        f"{shlex.join(command)}\nfailed with status {status}; its output is in '{run.log}'.", file=sys.stderr
    )
    sys.exit(status if status > 0 else 128 - status)
