"""The examples run as their heads say, and are as short as examples should be."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.commands import ROOT, run_module

EXAMPLES = ROOT / "recipes" / "examples"


def test_each_has_at_most_60_lines():
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lines) == 4 and max(lines.values()) <= 60, lines


def test_t5_learns_to_translate():
    pytest.importorskip("transformers")
    process = run_module("recipes.examples.t5_translation", "--pairs", "300", "--epochs", "8")
    assert process.returncode == 0, process.stderr
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", process.stdout)]
    sharpness = [float(value) for value in re.findall(r"'sharpness': '?([\d.]+)", process.stdout)]
    assert losses[-1] < 0.5 * losses[0] and len(losses) == len(sharpness) == 8
    assert all(value > 0 for value in sharpness)
    assert float(re.search(r"BLEU ([\d.]+)", process.stdout)[1]) > 1.0


def test_the_module_of_lightning_learns_the_digits():
    pytest.importorskip("lightning")
    process = run_module("recipes.examples.lightning_classifier", "--epochs", "2")
    assert process.returncode == 0, process.stderr
    logged = dict(re.findall(r"'(\w+)': ([\d.]+)", process.stdout))
    assert float(logged["valid_accuracy"]) > 0.85 and float(logged["sharpness"]) > 0


def test_two_processes_learn_the_digits_with_accelerate():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "recipes.examples.accelerate_loop", "--epochs", "2"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 0, process.stderr
    assert float(re.search(r"accuracy ([\d.]+)", process.stdout)[1]) > 0.85
    assert process.stdout.count("accuracy") == 1  # one of the two prints
