"""Makes the runs of a table or figure: every cell of it with every seed, several at a time."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

LINES_SHOWN_ON_FAILURE = 10

#: (row, column) -> options of `python -m fairseq_asam.vision train`; those not given are the paper's.
Cells = dict[tuple[str, str], dict[str, Any]]

OPTIMIZERS = {"SGD": "sgd", "SAM": "sam", "ASAM": "asam"}

#: The form that a CPU makes in minutes: other images, a small network, and few epochs, but enough for SGD to
#: fit the training images to the last, wrong labels included. As in the paper, SGD has twice as many as the
#: others. The values of rho are those that rho_search.py finds on held-out training images.
SMALL = {"dataset": "digits", "model": "resnet8", "batch_size": 64, "augmentation": "none"}
EMBEDDED = {
    "sgd": {**SMALL, "epochs": 40},
    "sam": {**SMALL, "epochs": 20, "rho": 0.2},
    "asam": {**SMALL, "epochs": 20, "rho": 1.0},
}


@dataclass(frozen=True, eq=False)
class Run:
    """One training: what `python -m fairseq_asam.vision train` is asked for, and the folder of the run."""

    folder: Path
    options: dict[str, Any]

    def command(self, launcher: str) -> list[str]:
        """Return the command that makes the run or goes on with it."""
        flags = [word for option in self.options.items() for word in as_flag(*option)]
        module = ["-m", "fairseq_asam.vision", "train", "--output", str(self.folder)]
        return [*shlex.split(launcher), *module, *flags]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished run, None if it is not finished.

        Raises:
            SystemExit: the folder holds a run with other options.
        """
        file = self.folder / "result.json"
        if not file.exists():
            return None
        result = json.loads(file.read_text("utf-8"))
        for name, value in self.options.items():
            made_with = result["options"].get(name, value)
            if made_with not in (value, str(value)):
                sys.exit(f"'{file}' was made with {name} {made_with}, not {value}: move its folder away.")
        return result


def as_flag(name: str, value: Any) -> list[str]:
    """Return the words of the command line for an option; a switch has no value."""
    # torchrun takes --m for one of its own
    flag = "--m-sharpness" if name == "m" else f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


def by_optimizer(rows: dict[str, dict[str, Any]], embedded: bool) -> Cells:
    """Return the cells of a table with a row of options each and a column for each optimizer."""
    return {
        (row, column): {**(EMBEDDED[optimizer] if embedded else {}), **options, "optimizer": optimizer}
        for row, options in rows.items()
        for column, optimizer in OPTIMIZERS.items()
    }


def arguments(
    name: str, description: str, seeds: int, rows: Sequence[str] = (), embedded_rows: Sequence[str] = ()
) -> argparse.Namespace:
    """Return what the command line says.

    Args:
        name: of the results and of the folder of the runs, with `-embedded` behind it for the embedded form.
        seeds: the number of runs of each cell unless --seeds says otherwise.
        rows, embedded_rows: what --rows may choose of, if anything, and what it is by default if embedded.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--embedded", action="store_true", help="scikit-learn's digits and a small network")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data set; not for digits")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR if it is missing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--seeds", type=int, default=seeds, help="runs of each cell (default: %(default)s)")
    if rows:
        some = f"some of {', '.join(rows)}".replace("%", "%%")
        parser.add_argument("--rows", nargs="+", choices=rows, metavar="ROW", help=some)
    parser.add_argument(
        "--launcher",
        default=sys.executable,
        help="what starts a run, such as 'accelerate launch --num_processes 4' (default: Python)",
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: that of the runs)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    args = parser.parse_args()
    if args.jobs < 1 or args.seeds < 1:
        parser.error(f"--jobs is {args.jobs} and --seeds {args.seeds}, but both must be at least 1")
    if rows:
        args.rows = args.rows or (embedded_rows if args.embedded else rows)
    args.name = f"{name}-embedded" if args.embedded else name
    args.runs = Path("runs") / "image_classification" / args.name
    args.out = args.out or args.runs
    return args


def results_of(cells: Cells, args: argparse.Namespace) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Make the runs that are not finished yet and return the results of all, by cell and in order of seeds.

    With --dry-run the commands are printed instead, and the program ends.
    """
    place = {"data": args.data, "download": args.download}
    place = {name: value for name, value in place.items() if value}
    runs = {
        cell: [
            Run(args.runs / folder_name(cell, seed), {**options, **place, "seed": seed})
            for seed in range(1, args.seeds + 1)
        ]
        for cell, options in cells.items()
    }
    every = [run for of_cell in runs.values() for run in of_cell]
    if args.dry_run:
        for run in every:
            print(shlex.join(run.command(args.launcher)))
        sys.exit()
    make(every, args.jobs, args.launcher)
    return {cell: [run.result() for run in of_cell] for cell, of_cell in runs.items()}


def folder_name(cell: tuple[str, str], seed: int) -> str:
    words = "".join(c if c.isalnum() or c in ".-" else " " for c in " ".join([*cell, f"seed {seed}"]))
    return "-".join(words.lower().split())


def make(runs: list[Run], jobs: int, launcher: str) -> None:
    """Make the runs that are not finished, so many at a time. The first that fails ends the program; those
    beside it stop, to go on from their last epoch another time."""
    waiting = deque(run for run in runs if run.result() is None)
    running: dict[Run, subprocess.Popen] = {}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), desc=runs[0].folder.parent.name, unit="run")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                with open(run.log, "a", encoding="utf-8") as log:
                    running[run] = subprocess.Popen(
                        run.command(launcher), env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
            for run in [run for run, process in running.items() if process.poll() is not None]:
                status = running.pop(run).returncode
                if status != 0:
                    lines = run.log.read_text("utf-8", errors="replace").splitlines()
                    print(*lines[-LINES_SHOWN_ON_FAILURE:], sep="\n", file=sys.stderr)
                    sys.exit(f"A run failed with status {status}; all of its output is in '{run.log}'.")
                bar.update()
            time.sleep(0.1)
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on after the last finished epoch of each run.")
    finally:
        bar.close()
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
