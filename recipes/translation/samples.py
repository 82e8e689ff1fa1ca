"""Puts sample translations of several runs side by side.

    python -m recipes.translation.samples OUT.md RUN RUN... [--split test] [--count 5]

The samples lie at equal distances over the split; nobody picks them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.options import at_least_1
from recipes.reporter import write_text
from recipes.translation.score import read_lines, references_of


def main() -> None:
    parser = argparse.ArgumentParser(description="Put sample translations of several runs side by side.")
    parser.add_argument("out", type=Path, help="the Markdown file to write")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of score.py")
    parser.add_argument("--split", default="test", help="the split that was scored (default: test)")
    parser.add_argument("--count", type=at_least_1, default=5, help="how many samples (default: 5)")
    args = parser.parse_args()
    for file in (run / f"{args.split}.hyp" for run in args.runs):
        if not file.exists():
            sys.exit(f"samples.py: '{file}' is missing: run score.py for it first.")

    def read(run: Path, ending: str) -> list[str]:
        return read_lines(run / f"{args.split}.{ending}")

    columns = {"source": read(args.runs[0], "src"), "reference": references_of(args.runs, args.split)}
    columns |= {run.name: read(run, "hyp") for run in args.runs}
    total = len(columns["source"])
    count = min(args.count, total)
    lines = [f"{count} of the {total} sentences of the split `{args.split}`, at equal distances.", ""]
    for i in range(count):
        number = (2 * i + 1) * total // (2 * count)
        lines += [f"**Sentence {number + 1}**", "", "| | |", "|:--|:--|"]
        lines += [
            f"| {name} | {text[number].replace('|', chr(92) + '|')} |" for name, text in columns.items()
        ]
        lines.append("")
    write_text(args.out, "\n".join(lines))


if __name__ == "__main__":
    main()
