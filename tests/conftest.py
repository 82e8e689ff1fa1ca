"""The corpus and the command lines that tests of several folders share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.commands import PLUGIN, Result, generate_corpus, run_module, start, trained


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
    preprocess = ("fairseq_cli.preprocess", "--only-source", *prefixes, f"--destdir={destination}")
    run_module(*preprocess).check_returncode()
    return destination


@pytest.fixture(scope="session")
def data(corpus) -> str:
    """What fairseq-preprocess wrote of the corpus, as commands name it."""
    return str(corpus / "bin")


@pytest.fixture(scope="session")
def adam(corpus, tmp_path_factory) -> str:
    """A checkpoint trained without the plugin."""
    return trained(tmp_path_factory.mktemp("runs") / "adam", corpus / "bin", "--optimizer", "adam")


@pytest.fixture(scope="session")
def asam(corpus, tmp_path_factory) -> str:
    """A checkpoint trained with the plugin."""
    flags = ["--optimizer", "asam", "--checkpoint-activations", "--source-lang", "de", "--target-lang", "en"]
    return trained(tmp_path_factory.mktemp("runs") / "asam", corpus / "bin", *flags, *PLUGIN)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``main`` of a module with arguments and return what it printed."""

    def run(module, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments), "--cpu"])
        module.main()
        return capsys.readouterr().out

    return run
