"""Run the benchmarks, on small models and batches, and read what they print."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.commands import run_module


def output_of(script: str, *arguments: str | Path) -> str:
    """What the script printed; it must have ended well."""
    process = run_module(f"recipes.benchmark.{script}", *arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout


def rows_of(text: str) -> list[list[str]]:
    """The cells of every row of the tables in a text, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("|:-")]
    headings = {*rules, *(i - 1 for i in rules)}
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for i, line in enumerate(lines)
        if i not in headings
    ]


def assert_refused(script: str, arguments: list[str], message: str, monkeypatch, capfd) -> None:
    """Assert that a script with these arguments ends with a sentence that matches *message*."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"recipes.benchmark.{script}").main()
    assert end.value.code == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith(f"{script}.py: error: ")
    assert re.search(message, last)
