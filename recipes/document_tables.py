"""The tables of results in the Markdown files, each printed from JSON files of recipes/results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.reporter import markdown_table
from recipes.translation import gains
from recipes.translation.table5 import between

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"
TRANSLATION = RESULTS / "translation"


def read(file: str) -> Any:
    return json.loads((RESULTS / file).read_text("utf-8"))


def first_screen() -> str:
    """Averaged weights against Adam's averaged weights, after 30 and after 60 epochs."""
    lengths = ("help_8000", "help_8000_60_epochs")
    systems = [
        gains.read([TRANSLATION / length / f"{table}.json" for table in ("table5", "gain_and_cost")])
        for length in lengths
    ]
    adam = [next(row for row in rows if row["system"] == "Adam, averaged") for rows in systems]
    header = ["", "training time", *(f"{row['epochs']} epochs" for row in adam)]
    rows = [["Adam", "1.00", *(f"{row['mean']['test BLEU']:.2f}" for row in adam)]]
    found = [{form.name: form for form in gains.forms(each)} for each in systems]
    for name in ("SAM, momentum", "SAM", "ASAM", "Adam, twice the epochs"):
        of_name = [forms[name] for forms in found]
        cells = [f"{f.averaged.difference:+.2f} ({between(f.averaged.interval)})" for f in of_name]
        rows.append([name, f"{of_name[0].time:.2f}", *cells])
    return markdown_table(header, rows)


TABLES: dict[str, Callable[[], str]] = {each.__name__: each for each in (first_screen,)}
