"""Runs the scripts as a user does, and reads the commands that they would start."""

from __future__ import annotations

import argparse
import runpy
import sys

import pytest

from fairseq_asam.vision.__main__ import add_options
from fairseq_asam.vision.options import TrainOptions


@pytest.fixture
def main(monkeypatch):
    """Run a script: ``main("tables", "2", "--dry-run")``."""

    def run(script: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        runpy.run_module(f"recipes.image_classification.{script}", run_name="__main__")

    return run


@pytest.fixture
def commands(main, capsys):
    """Return the options of every run of a script: ``commands("tables", "2", "--digits")``."""

    def dry_run(script: str, *arguments: str) -> list[TrainOptions]:
        with pytest.raises(SystemExit) as end:
            main(script, *arguments, "--dry-run")
        assert not end.value.code
        return [options_of(line) for line in capsys.readouterr().out.splitlines()]

    return dry_run


def options_of(command: str) -> TrainOptions:
    """Return what a command of a dry run asks for, as the training resolves it."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_options(parser)
    return TrainOptions(**vars(parser.parse_args(command.split(" train ")[1].split()))).resolved()
