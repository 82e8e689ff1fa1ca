"""Writes what a finished run found to one small JSON file, and deletes its checkpoints.

    python -m recipes.translation.record RUN FILE

RUN is a folder of train.py whose test set, and that of its average in RUN/average, score.py has translated.
FILE gets the run's options, validation and training figures of each epoch, the seconds of the training, and
the scores of both translations.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fairseq_asam.files import write_json
from recipes.translation.train_log import read_epochs, training_seconds

#: What is kept of each epoch, and its name in fairseq's log.
OF_AN_EPOCH = {
    "epoch": "epoch",
    "validation loss": "valid_loss",
    "validation BLEU": "valid_bleu",
    "training loss": "train_loss",
}
#: Where the translations of a run are.
SCORED = {"best": "", "averaged": "average"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep what a finished run found, without its checkpoints.")
    parser.add_argument("run", type=Path, help="folder of train.py, with its average and scores")
    parser.add_argument("file", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    for name in ("run.json", "log", *(str(Path(part, "test.json")) for part in SCORED.values())):
        if not (args.run / name).exists():
            sys.exit(f"record.py: '{args.run / name}' is missing: train, average and score the run first.")
    record(args.run, args.file)


def record(run: Path, file: Path) -> None:
    """Write *file* about the folder *run*, then delete the checkpoints in it."""
    epochs = read_epochs(run / "log")
    scores = {
        name: json.loads((run / part / "test.json").read_text("utf-8")) for name, part in SCORED.items()
    }
    write_json(
        file,
        {
            "options": json.loads((run / "run.json").read_text("utf-8"))["options"],
            "training seconds": training_seconds([run / "log"]),
            "epochs": [
                {name: epoch[logged] for name, logged in OF_AN_EPOCH.items() if logged in epoch}
                for epoch in epochs
            ],
            "test": {
                name: {metric: each[metric] for metric in ("BLEU", "chrF2")} for name, each in scores.items()
            },
            "signatures": scores["best"]["signatures"],
        },
    )
    for checkpoint in run.rglob("*.pt"):
        checkpoint.unlink()


if __name__ == "__main__":
    main()
