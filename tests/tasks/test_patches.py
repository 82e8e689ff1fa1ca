"""The table of what the plugin replaces in fairseq: each entry has a test that fails without it."""

import importlib
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
from fairseq import utils
from fairseq.file_io import PathManager

from fairseq_asam.tasks.patches import PATCHES
from tests.commands import ROOT

NAMES = [f"{patch.owner.__name__}.{patch.name}" for patch in PATCHES]


def test_a_second_user_dir_replaces_nothing_again():
    before = [getattr(patch.owner, patch.name) for patch in PATCHES]
    for _ in range(2):
        utils.import_user_module(Namespace(user_dir=str(ROOT / "fairseq_asam")))
    assert [getattr(patch.owner, patch.name) for patch in PATCHES] == before


def test_a_static_method_that_is_replaced_stays_one(tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_text("text")
    assert PathManager().copy(str(source), str(destination), overwrite=True)
    assert destination.read_text() == "text"


@pytest.mark.parametrize("patch", PATCHES, ids=NAMES)
def test_the_test_of_a_patch_exists(patch):
    path, name = patch.test.split("::")
    assert hasattr(importlib.import_module(path[: -len(".py")].replace("/", ".")), name)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(PATCHES)), ids=NAMES)
def test_the_test_of_a_patch_fails_without_it(index, tmp_path):
    """In a copy of this repository whose table lacks the patch."""
    copy = tmp_path / "copy"
    skipped = shutil.ignore_patterns(".git", ".venv", ".*cache", "__pycache__", "results", "runs", "data")
    shutil.copytree(ROOT, copy, ignore=skipped)
    with open(copy / "fairseq_asam" / "tasks" / "patches.py", "a") as table:
        table.write(f"\ndel PATCHES[{index}]\n")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", PATCHES[index].test]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout[-3000:]
    assert f"FAILED {PATCHES[index].test}" in result.stdout and "ERROR" not in result.stdout
