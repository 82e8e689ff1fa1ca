"""Runs fairseq-train, appends everything it prints to a log, and shows a progress bar made from the log.

    python -m recipes.translation.progress LOG fairseq-train DATA --log-format json ...

The command writes into the log itself: should this process be killed, the log stays whole. If the command
fails, the last lines of the log are shown and the exit status is the command's.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from recipes.translation.train_log import parse

LINES_SHOWN_ON_FAILURE = 20


def main() -> int:
    log_path, command = Path(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with open(log_path, "a", encoding="utf-8") as log:
        start = log.tell()
        # The command inherits train.sh's lock, should it outlive this process.
        training = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, close_fds=False)
    try:
        show_progress(training, log_path, start, name=log_path.parent.name, epochs=max_epoch(command))
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on after the last finished epoch.", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        training.terminate()
        status = training.wait()
    if status != 0:
        show_failure(command[0], status, log_path, start)
    return status if status >= 0 else 128 - status


def show_failure(program: str, status: int, log_path: Path, start: int = 0) -> None:
    """Print the last lines that stand after byte `start` in the log of a program that failed."""
    with open(log_path, encoding="utf-8", errors="replace") as log:
        log.seek(start)
        sys.stderr.writelines(log.readlines()[-LINES_SHOWN_ON_FAILURE:])
    print(f"{program} failed with status {status}; all of its output is in {log_path}.", file=sys.stderr)


def max_epoch(command: list[str]) -> int | None:
    """Return the last value given for --max-epoch, None without one."""
    values = [int(value) for flag, value in zip(command, command[1:]) if flag == "--max-epoch"]
    return values[-1] if values else None


def show_progress(
    training: subprocess.Popen, log_path: Path, start: int, name: str, epochs: int | None
) -> None:
    """Follow the log from byte `start` until `training` has ended."""
    bar = tqdm(
        desc=name,
        total=epochs,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| epoch {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    shown: dict[str, str] = {}
    resumed = False
    rest = ""
    with bar, open(log_path, encoding="utf-8", errors="replace") as log:
        log.seek(start)
        ended = False
        while not ended:
            ended = training.poll() is not None
            *lines, rest = (rest + log.read()).split("\n")
            for tag, figures in filter(None, map(parse, lines)):
                if tag == "train_inner":
                    if not resumed:
                        bar.initial = bar.n = figures["epoch"] - 1
                        resumed = True
                    bar.update(figures["update"] - bar.n)
                elif tag == "train":
                    bar.update(figures["epoch"] - bar.n)
                for key, label in (
                    ("loss", "loss"),
                    ("train_loss", "loss"),
                    ("valid_loss", "valid"),
                    ("sharpness", "sharpness"),
                ):
                    if key in figures:
                        shown[label] = f"{figures[key]:.4g}"
                bar.set_postfix(shown, refresh=False)
            time.sleep(0 if ended else 0.2)


if __name__ == "__main__":
    sys.exit(main())
