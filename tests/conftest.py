"""The corpus and the command lines that tests of several folders share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import Result, generate_corpus, start


@pytest.fixture
def fairseq(tmp_path):
    """Run a fairseq command to its end: ``fairseq("train", *arguments)``."""

    def run(command: str, *arguments) -> Result:
        log = tmp_path / "output.log"
        process = start(command, arguments, log)
        process.join()
        return Result(process.exitcode, log.read_text())

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The generated corpus, prepared: ``bin/`` is what fairseq-preprocess wrote."""
    return generate_corpus(tmp_path_factory.mktemp("corpus") / "generated")


@pytest.fixture(scope="session")
def monolingual(corpus, tmp_path_factory) -> Path:
    """The English side of the corpus, binarized word by word."""
    destination = tmp_path_factory.mktemp("monolingual")
    prefixes = [f"--{split}pref={corpus}/{split}.en" for split in ("train", "valid", "test")]
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", *prefixes]
    subprocess.run([*command, f"--destdir={destination}"], check=True, capture_output=True)
    return destination
