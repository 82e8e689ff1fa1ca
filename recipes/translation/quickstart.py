"""Trains the set-up `quickstart` with Adam, SAM and ASAM, all at once, and translates the test set.

    python -m recipes.translation.quickstart OUT

OUT gets a folder for each run. Stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.setups import SETUPS
from recipes.translation.experiment import complete_and_score
from recipes.translation.train import training

# ASAM's default rho of 0.2 is more than so short a training takes, by its validation BLEU.
OWN_FLAGS = {"adam": [], "sam": [], "asam": ["--rho", "0.1"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--data", type=Path, help="corpus folder (default: the set-up's in data/)")
    args, flags = parser.parse_known_args()
    data = SETUPS["quickstart"].folder(args.data)
    runs = [
        training("quickstart", name, data, args.out / name, [*own, *flags]) for name, own in OWN_FLAGS.items()
    ]
    # All at once, so that no core waits for the last of them.
    complete_and_score(data, runs, ["test"], jobs=len(runs))


if __name__ == "__main__":
    main()
