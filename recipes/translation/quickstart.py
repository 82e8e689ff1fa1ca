"""Trains the set-up `quickstart` with Adam, SAM and ASAM, all at once, and translates the test set.

    python -m recipes.translation.quickstart OUT

OUT gets a folder for each run. Stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.setups import SETUPS
from recipes.translation.experiment import complete_and_score
from recipes.translation.train import OPTIMIZERS, training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--data", type=Path, help="corpus folder (default: the set-up's in data/)")
    args, flags = parser.parse_known_args()
    data = SETUPS["quickstart"].folder(args.data)
    runs = [training("quickstart", name, data, args.out / name, flags) for name in OPTIMIZERS]
    # All at once, so that no core waits for the last of them.
    complete_and_score(data, runs, ["test"], jobs=len(runs))


if __name__ == "__main__":
    main()
