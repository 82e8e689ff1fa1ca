"""Packs what the runs of an experiment found, without their checkpoints.

    python -m recipes.translation.archive RUNS FILE

RUNS is the folder of results of table5.py, rho_search.py or gain_and_cost.py. FILE, a .tar.xz, gets of each
finished run its options, the figures of its log, its translations and their scores. It is small enough to
publish, for others to score the translations by another metric. Unpacked on another machine with `mkdir -p
RUNS` and `tar xf FILE -C RUNS`, it lets the experiment's command go on from there, for example with more
seeds. The text of the corpus is not in it: score.py copies it from the corpus folder.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path

from tqdm import tqdm

from fairseq_asam.files import whole
from recipes.translation.train_log import parse


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack what the runs of an experiment found.")
    parser.add_argument("runs", type=Path, help="folder of results of an experiment")
    parser.add_argument("file", type=Path, help="the .tar.xz to write")
    args = parser.parse_args()
    runs = [file.parent for file in sorted(args.runs.rglob("run.json")) if is_translated(file.parent)]
    if not runs:
        sys.exit(f"archive.py: '{args.runs}' holds no finished run with translations: make the runs first.")
    with whole(args.file) as temporary, tarfile.open(temporary, "w:xz") as archive:
        for run in tqdm(runs, desc="packing", unit="run", disable=None):
            for file in [run / "run.json", run / "log", *sorted(run.glob("*.hyp"))]:
                add(archive, args.runs, file)
                if file.suffix == ".hyp":
                    add(archive, args.runs, file.with_suffix(".json"))
    print(f"{args.file}: {len(runs)} runs, {args.file.stat().st_size / 1e6:.1f} MB")


def is_translated(run: Path) -> bool:
    """Return whether *run* is a finished training or average of which score.py has translated a split."""
    found = json.loads((run / "run.json").read_text("utf-8"))
    return found["finished"] and "split" not in found["options"] and any(run.glob("*.hyp"))


def add(archive: tarfile.TarFile, root: Path, file: Path) -> None:
    """Add *file* under its path below *root*; of a log, the lines with figures alone."""
    text = file.read_text("utf-8")
    if file.name == "log":
        # The others tell of the machine.
        text = "".join(line for line in text.splitlines(keepends=True) if parse(line))
    content = text.encode("utf-8")
    member = tarfile.TarInfo(str(file.relative_to(root)))
    member.size, member.mtime = len(content), int(file.stat().st_mtime)
    archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
