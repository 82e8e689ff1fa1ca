"""Trains the set-up `quickstart` with Adam, SAM and ASAM, two at a time, and translates the test set.

    python -m recipes.translation.quickstart OUT

OUT gets a folder for each run. Stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from recipes.setups import SETUPS
from recipes.translation.experiment import complete_and_score
from recipes.translation.train import training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--data", type=Path, help="corpus folder (default: the set-up's in data/)")
    args, flags = parser.parse_known_args()
    data, jobs = SETUPS["quickstart"].folder(args.data), min(2, os.cpu_count() or 1)
    # The longest first: Adam and SAM together take the time of ASAM and half of it more.
    optimizers = ("asam", "adam", "sam")
    runs = [training("quickstart", name, data, args.out / name, flags) for name in optimizers]
    complete_and_score(data, runs, ["test"], jobs)


if __name__ == "__main__":
    main()
