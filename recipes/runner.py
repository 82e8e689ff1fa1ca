"""Makes the runs of an experiment: each once, several at a time, and only those that are missing.

A table or figure describes its runs with :class:`Run` and hands them to :func:`complete`. The same command,
started again after a stop, goes on with what is left.
"""

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
from typing import IO, Any

from tqdm import tqdm

from fairseq_asam.files import write_json

LINES_SHOWN_ON_FAILURE = 20
SECONDS_BETWEEN_LOOKS = 0.1
#: By default glibc gives freed tensors back to the kernel, which clears their pages when they are used
#: again. On a CPU that takes a third of the training time of a small model.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
#: Is asked about a run under way. Returns the share that is done and a few words for the progress bar.
Watch = Callable[["Run"], "tuple[float, str]"]


@dataclass(frozen=True, eq=False)
class Run:
    """A folder and the commands that fill it.

    Attributes:
        folder: holds run.json, log (all that the commands print) and what the commands write.
        options: all that decides the result, as JSON has it. A folder with other options is refused.
        commands: make the result, one after the other. Each must go on where it was stopped.
    """

    folder: Path
    options: dict[str, Any]
    commands: Sequence[Sequence[str]] = field(repr=False)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def is_finished(self) -> bool:
        """Return whether all commands have succeeded.

        Raises:
            SystemExit: The folder holds a run with other options.
        """
        file = self.folder / "run.json"
        if not file.exists():
            return False
        try:
            found = json.loads(file.read_text("utf-8"))
            there, finished = dict(found["options"]), found["finished"]
        except (ValueError, TypeError, KeyError):
            sys.exit(f"'{file}' is not of a run made here: move '{self.folder}' away.")
        options = json.loads(json.dumps(self.options))
        for name in {**options, **there}:
            if there.get(name) != options.get(name):
                sys.exit(
                    f"'{self.folder}' holds a run with {name} {there.get(name)}, not {options.get(name)}: "
                    "move it away."
                )
        return finished

    def note(self, finished: bool) -> None:
        """Write run.json."""
        write_json(self.folder / "run.json", {"options": self.options, "finished": finished})


def flags(options: dict[str, Any]) -> list[str]:
    """Return *options* as words of a command line: ``True`` is a switch, ``None`` and ``False`` are none."""
    words = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return words


def complete(runs: Sequence[Run], jobs: int = 1, watch: Watch | None = None) -> None:
    """Make those of *runs* that are not finished, *jobs* at a time, behind a progress bar.

    A run that fails ends the program with the last lines of its log. The runs beside it are stopped, as they
    are on Ctrl-C and SIGTERM. They go on when the same command is started again.

    Args:
        runs: All runs of the experiment, finished ones too.
        jobs: How many run at the same time. They share the processor's threads.
        watch: Says how far a run is.

    Raises:
        SystemExit: *jobs* is below 1, a folder holds a run with other options, or a run failed.
    """
    if jobs < 1:
        sys.exit(f"--jobs is {jobs}, but it must be at least 1.")
    waiting = [run for run in runs if not run.is_finished()]
    bar = tqdm(
        total=len(runs),
        initial=len(runs) - len(waiting),
        unit="run",
        desc="runs",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.3g} of {total} [{elapsed}<{remaining}{postfix}]",
        mininterval=0.5 if sys.stderr.isatty() else 60,
        miniters=0,  # otherwise, after a resumed run has jumped to its share, tqdm waits for as large a step
    )
    with bar, _ending_signals() as received, contextlib.ExitStack() as stack:
        underway: dict[Run, Iterator[None]] = {}
        while waiting or underway:
            if signal.SIGINT in received:
                sys.exit("Interrupted; the same command goes on where each run was stopped.")
            if received:
                sys.exit(128 + received[0])
            while waiting and len(underway) < jobs:
                run = waiting.pop(0)
                underway[run] = stack.enter_context(contextlib.closing(_steps(run, jobs)))
            for run, steps in list(underway.items()):
                if next(steps, "ended") == "ended":
                    del underway[run]
            seen = [watch(run) for run in underway] if watch else []
            bar.set_postfix_str("; ".join(words for _, words in seen if words), refresh=False)
            done = len(runs) - len(waiting) - len(underway) + sum(share for share, _ in seen)
            bar.update(done - bar.n)
            if underway:
                time.sleep(SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def _ending_signals() -> Iterator[list[int]]:
    """Collect the signals that ask this program to end.

    An exception raised by a handler could come between the start of a command and the note that it runs.
    """
    received: list[int] = []
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, lambda n, frame: received.append(n)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _steps(run: Run, jobs: int) -> Iterator[None]:
    """Make *run*, yielding while it goes on. Closing the iterator stops the run."""
    if run.folder.exists() and not run.folder.is_dir():
        sys.exit(f"'{run.folder}' is no folder: choose another for the run.")
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "run.lock", "w") as lock, open(run.log, "a", encoding="utf-8") as log:
        if not _locked(lock):
            tqdm.write(f"Another process makes '{run.folder}'; waiting for it.", file=sys.stderr)
            while not _locked(lock):
                yield
        if run.is_finished():  # made by the process that had the lock
            return
        run.note(finished=False)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **KEEP_FREED_MEMORY, **os.environ}
        for command in run.commands:
            begin = log.tell()
            try:
                process = subprocess.Popen(
                    list(command),
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock.fileno()],  # keeps the lock if the command outlives this process
                    start_new_session=True,  # so that one signal reaches all processes of the command
                )
            except OSError as error:
                sys.exit(f"{shlex.join(command)}\ncannot be started: {error}.")
            try:
                while process.poll() is None:
                    yield
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            if process.returncode != 0:
                _fail(run, command, process.returncode, begin)
        run.note(finished=True)


def _locked(file: IO[str]) -> bool:
    """Return whether this process got the lock on *file*."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _fail(run: Run, command: Sequence[str], status: int, begin: int) -> None:
    """End the program with what *command* has logged since the position *begin*."""
    with open(run.log, encoding="utf-8", errors="replace") as log:
        log.seek(begin)
        lines = log.read().splitlines()[-LINES_SHOWN_ON_FAILURE:]
    ending = f"failed with status {status}; its output is in '{run.log}'."
    tqdm.write("\n".join([*lines, shlex.join(command), ending]), file=sys.stderr)
    sys.exit(status if status > 0 else 128 - status)
