"""Prints the tables of the Markdown files from JSON, and checks the figures in their sentences.

    python -m recipes.documents              # prints every table anew, in its place
    python -m recipes.documents NAME         # prints one table
    python -m recipes.documents --check      # changes nothing, names what is wrong

A table of results stands between two markers. NAME is one of TABLES in recipes/document_tables.py:

    <!-- table: python -m recipes.documents NAME -->
    <!-- end -->

A figure in a sentence is a link to a JSON file of recipes/results. The title of the link is the key:

    [+0.44 (-1.08 to +1.96)](FILE.json "systems/SAM/against baseline/BLEU/difference; .../t_interval")

A key is a path of names and indices. In a list, a name finds the item that has it as a value; `40% & SAM`
finds the item that has both. Several keys are parted by semicolons. The numbers of the text are those at the
keys, in this order, rounded to as many decimals. Before a percent sign, they are multiplied by 100.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from recipes.document_tables import RESULTS, ROOT, TABLES
from recipes.reporter import write_text

BEGIN = "<!-- table:"
TABLE = re.compile(
    rf"^({BEGIN} python -m recipes\.documents (\S+) -->\n).*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE
)
FIGURE = re.compile(r'\[([^\]]*)\]\((?!\w+:)([^)\s]+\.(?:json|md))(?: "([^"]*)")?\)')
#: A number that is not a part of a name, such as that of ResNet-20.
NUMBER = re.compile(r"(?<![\w.-])[-+]?\d[\d,]*(?:\.\d+)?(?![\w-])%?")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of the Markdown files from JSON.")
    parser.add_argument("name", nargs="?", choices=list(TABLES), metavar="NAME", help="print this table only")
    parser.add_argument("--check", action="store_true", help="change nothing, name what is wrong")
    args = parser.parse_args()
    if args.name:
        print(TABLES[args.name](), end="")
        return
    wrong = []
    for document in documents():
        text = document.read_text("utf-8")
        if not args.check and with_tables(text) != text:
            write_text(document, with_tables(text))
        wrong += wrong_tables(document) + wrong_figures(document)
    if wrong:
        sys.exit("\n".join(wrong))


def documents() -> list[Path]:
    """Return the Markdown files that git knows."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in listed.stdout.splitlines()]


def with_tables(text: str) -> str:
    """Return *text* with each table of TABLES printed anew."""
    return TABLE.sub(
        lambda found: found[1] + TABLES[found[2]]() + found[3] if found[2] in TABLES else found[0], text
    )


def wrong_tables(document: Path) -> list[str]:
    """Return a sentence for each thing that is wrong with the tables of *document*."""
    text = document.read_text("utf-8")
    names = [name for _, name, _ in TABLE.findall(text)]
    sentences = [f"{document}: there is no table '{name}'" for name in names if name not in TABLES]
    if len(names) != len(re.findall(f"^{BEGIN}", text, re.MULTILINE)):
        sentences.append(
            f"{document}: a table has no '<!-- end -->', or its first marker is not as it should be"
        )
    if with_tables(text) != text:
        sentences.append(f"{document}: a table is not that of its file: run python -m recipes.documents")
    return sentences


def wrong_figures(document: Path) -> list[str]:
    """Return a sentence for each figure of *document* that is not what stands at its key."""
    sentences = []
    for text, target, keys in FIGURE.findall(document.read_text("utf-8")):
        file = (document.parent / target).resolve()
        numbers = NUMBER.findall(text)
        if file.suffix == ".md":  # a page may be called "60 epochs", but a figure has to link its JSON file
            numbers = [number for number in numbers if "." in number]
        if RESULTS not in file.parents or not numbers:
            continue
        try:
            content = json.loads(file.read_text("utf-8"))
            values = [value for key in keys.split(";") for value in numbers_at(content, key.strip())]
        except (KeyError, ValueError, OSError) as error:
            sentences.append(f"{document}: '{text}' needs a key of '{target}' as title of the link: {error}")
            continue
        expected = [rounded(value, like=number) for value, number in zip(values, numbers)]
        if len(values) != len(numbers) or expected != numbers:
            sentences.append(
                f"{document}: '{text}' should have {', '.join(expected)}, by '{keys}' of '{target}'"
            )
    return sentences


def numbers_at(content: Any, key: str) -> list[float]:
    """Return the numbers at *key* of what a JSON file holds: one, or those of a list.

    Raises:
        KeyError: There is no such key, or no number.
    """
    for step in key.split("/"):
        content = child(content, step)
    numbers = content if isinstance(content, list) else [content]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise KeyError(f"no number at '{key}'")
    return numbers


def child(content: Any, step: str) -> Any:
    """Return the part of *content* that *step* of a key names."""
    if isinstance(content, dict) and step in content:
        return content[step]
    if isinstance(content, list) and step.lstrip("-").isdigit():
        return content[int(step)]
    if isinstance(content, list):
        wanted = step.split(" & ")
        found = [item for item in content if all(word in map(str, item.values()) for word in wanted)]
        if len(found) == 1:
            return found[0]
    raise KeyError(step)


def rounded(value: float, like: str) -> str:
    """Return *value* written as the number *like* is."""
    decimals = len(like.rstrip("%").partition(".")[2])
    sign = "+" if like[0] in "+-" else ""
    comma = "," if "," in like else ""
    percent = "%" if like.endswith("%") else ""
    return f"{value * (100 if percent else 1):{sign}{comma}.{decimals}f}{percent}"


if __name__ == "__main__":
    main()
