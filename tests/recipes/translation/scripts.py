"""The translation recipe's commands, on a tiny corpus with a tiny model."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, SIZES, run_module

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}
PAIRED = ("-m", "bleu", "--paired-bs", "-f", "json")
# Of fairseq-train, with which a smaller model than the quickstart's learns the tiny corpus.
FLAGS = (*SIZES, "--lr", "0.01", "--warmup-updates", "20", "--max-tokens", "600", "--max-epoch", "5", "--cpu")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**ENVIRONMENT, **variables}, text=True, capture_output=True
    )


def script(name: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
    return run_module(f"recipes.translation.{name}", *arguments, **{**ENVIRONMENT, **variables})


def train(
    corpus: Path, folder: Path, optimizer: str, *flags: str, **variables
) -> subprocess.CompletedProcess:
    arguments = ("quickstart", optimizer, folder, "--data", corpus, *FLAGS, *flags)
    return script("train", *arguments, **variables)


def refusal(name: str, *arguments: str | Path) -> str:
    """Run a script in this process; it must end with a sentence, which is returned."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        pytest.raises(SystemExit) as end,
    ):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(f"recipes.translation.{name}").main()
    if end.value.code == 2:  # of argparse, which shows the usage before
        return said.getvalue().splitlines()[-1]
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def succeeded(process: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert process.returncode == 0, process.stderr
    return process


def compared(out: Path, runs: list[Path]) -> dict:
    succeeded(script("compare", out, *runs))
    return json.loads((out / "results.json").read_text())


def lines(file: Path) -> list[str]:
    return file.read_text("utf-8").splitlines()
