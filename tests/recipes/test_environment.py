"""What environment.sh says about a machine on which it cannot work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with just what environment.sh reads."""
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "environment.sh", tmp_path / "recipes")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def environment(checkout: Path, extra: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [checkout / "recipes" / "environment.sh", extra],
        env={**os.environ, "PYTHON": sys.executable, **variables},
        text=True,
        capture_output=True,
    )


def python_that(checkout: Path, answers: str) -> str:
    """A Python that is the real one except for what `answers`, lines of a shell `case`, say otherwise."""
    program = checkout / "python"
    program.write_text(f'#!/bin/sh\ncase "$2" in\n{answers}\nesac\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_what_is_missing_is_named_in_one_sentence(checkout: Path):
    old = python_that(checkout, "*version_info*) echo 3.8; exit;;")
    for process, sentence in (
        (environment(checkout, "everything"), "'recipes' or 'test', not 'everything'"),
        (environment(checkout, "test", PYTHON="no-python"), "'no-python' was not found"),
        (environment(checkout, "test", PYTHON=old), f"'{old}' is Python 3.8, 3.9 or newer is needed"),
        (environment(checkout, "test", CXX="no-compiler"), "no C++ compiler 'no-compiler' was found"),
    ):
        assert process.returncode == 1
        assert sentence in process.stderr
        assert len(process.stderr.splitlines()) == 1
    without_venv = python_that(checkout, "*ensurepip*) exit 1;;")
    process = environment(checkout, "test", PYTHON=without_venv)
    assert process.returncode == 1
    assert "has no venv module" in process.stderr
    assert not (checkout / ".venv").exists()


def test_a_foreign_environment_is_left_alone(checkout: Path):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "precious").touch()
    process = environment(checkout, "test")
    assert process.returncode == 1
    assert "not of this script's making" in process.stderr
    assert (checkout / ".venv" / "precious").exists()
