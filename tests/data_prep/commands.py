"""The commands that prepare corpora, run as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.commands import run_module


def command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"data_prep.{module}", *map(str, arguments)]


def run(module: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    return run_module(f"data_prep.{module}", *arguments, **variables)


def assert_refused(result: subprocess.CompletedProcess, *telling: object) -> None:
    """Assert that one line on stderr has all of `telling` in it, and that the exit status is not 0."""
    assert result.returncode != 0
    (sentence,) = result.stderr.strip().splitlines()
    for part in telling:
        assert str(part) in sentence


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file, but for a log that names the folder it was made in."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "preprocess.log"
    }


def lines(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text(encoding="utf-8").splitlines()
