"""Trains a Transformer with one of the set-ups of recipes/setups.py.

    python -m recipes.translation.train SETUP adam|sam|asam RUN [--data DATA] [fairseq-train flags]

Prints the fairseq-train command, runs it and shows its progress. The flags win over the set-up's. DATA is a
corpus folder of data_prep (default: the set-up's in data/). The folder RUN gets run.json, log, and the
checkpoints of the last and the best epoch; with `--keep-last-epochs N` also those of the last N epochs.
Stopped at any time, the same command goes on after the last finished epoch. A finished run is left alone.

fairseq-train takes all GPUs that CUDA_VISIBLE_DEVICES shows. The environment variable LAUNCHER, if set, is a
command that starts it, for example 'torchrun --nproc_per_node 4 --no-python'.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import fairseq_asam
from recipes.runner import Run, complete
from recipes.setups import SETUPS, configuration, count_updates
from recipes.translation.train_log import read_progress

OPTIMIZERS = ("adam", "sam", "asam")
#: What the progress bar shows of the log.
SHOWN = {"loss": "loss", "valid_loss": "valid", "sharpness": "sharpness"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Other flags go to fairseq-train.", allow_abbrev=False
    )
    parser.add_argument("setup", choices=list(SETUPS), help="corpus, model and training")
    parser.add_argument("optimizer", choices=OPTIMIZERS)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--data", type=Path, help="corpus folder of data_prep (default: the set-up's in data/)"
    )
    args, flags = parser.parse_known_args()
    run = training(args.setup, args.optimizer, SETUPS[args.setup].folder(args.data), args.run, flags)
    if run.is_finished():
        print(f"'{run.folder}' is trained already.")
        return
    print(shlex.join(run.commands[0]), flush=True)
    complete([run], watch=watch)


def training(setup: str, optimizer: str, data: Path, folder: Path, flags: Sequence[str]) -> Run:
    """Return the run of fairseq-train.

    Args:
        setup: Its name.
        optimizer: One of :data:`OPTIMIZERS`.
        data: Folder of the corpus.
        folder: Folder of the run.
        flags: Further flags of fairseq-train. They win over the set-up's.

    Raises:
        SystemExit: fairseq refuses a flag, or *folder* holds checkpoints that are not of such a run.
    """
    if (folder / "checkpoint_last.pt").exists() and not (folder / "run.json").exists():
        sys.exit(
            f"'{folder}' holds checkpoints of unknown options (it has no run.json): move the folder away."
        )
    plugin = Path(fairseq_asam.__file__).parent
    arguments = [str(data / "bin"), "--user-dir", str(plugin), "--optimizer", optimizer]
    place = ["--save-dir", str(folder), "--log-format", "json", "--log-interval", "50"]
    if not any(word.partition("=")[0] == "--keep-last-epochs" for word in flags):
        place.append("--no-epoch-checkpoints")
    arguments += SETUPS[setup].flags([*place, *flags])
    cfg = configuration(
        ["1" if word == "UPDATES" else word for word in arguments],
        lambda message: sys.exit(f"fairseq-train: {message}"),
    )
    if "UPDATES" in arguments:
        arguments[arguments.index("UPDATES")] = str(count_updates(cfg))
    launcher = shlex.split(os.environ.get("LAUNCHER", ""))
    program = str(Path(sys.executable).with_name("fairseq-train"))
    options = {
        "setup": setup,
        "optimizer": optimizer,
        "rho": getattr(cfg.optimizer, "rho", None),
        "epochs": cfg.optimization.max_epoch,
        "seed": cfg.common.seed,
        "data of checksum": checksum(data),
        "flags": list(flags),
        # What the set-up says today: it may say something else tomorrow.
        "model": " ".join(SETUPS[setup].model.split()),
        "training": " ".join(SETUPS[setup].training.split()),
    }
    return Run(folder, options, [[*launcher, program, *arguments]])


def checksum(data: Path) -> int:
    """Return a checksum of the lengths of all sentences of a corpus."""
    value = 0
    for file in sorted(data.glob("bin/*.idx")):
        value = zlib.crc32(file.read_bytes(), value)
    return value


def watch(run: Run) -> tuple[float, str]:
    """Return the share of its epochs that *run* has made, and its last figures in words."""
    epochs, figures = read_progress(run.log)
    words = "".join(f", {label} {figures[key]:.4g}" for key, label in SHOWN.items() if key in figures)
    return min(1.0, epochs / max(1, run.options["epochs"])), run.folder.name + words


if __name__ == "__main__":
    main()
