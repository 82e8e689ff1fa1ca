"""A run is trained once, resumed where it was stopped, and refused where the options are others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import ROOT, assert_same_state, checkpoint
from tests.recipes.translation.scripts import ENVIRONMENT, FLAGS, compared, refusal, script, succeeded, train


def test_the_command_is_printed_and_a_finished_run_is_left_alone(corpus: Path, tmp_path: Path):
    folder = tmp_path / "adam"
    printed = succeeded(train(corpus, folder, "adam", "--max-epoch", "1")).stdout
    assert f"fairseq-train {corpus}/bin --user-dir" in printed and printed.endswith("--max-epoch 1\n")
    flags = [word for word in printed.split() if word.startswith("--")]
    assert len(flags) == len(set(flags))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = succeeded(train(corpus, folder, "adam", "--max-epoch", "1"))
    assert again.stdout == f"'{folder}' is trained already.\n"
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_the_schedule_ends_with_the_last_update(runs: list[Path]):
    for each in runs:
        assert planned_updates(each) == made_updates(each) > 5


def planned_updates(folder: Path) -> int:
    return checkpoint(folder)["cfg"]["lr_scheduler"]["total_num_update"]


def made_updates(folder: Path) -> int:
    return checkpoint(folder)["optimizer_history"][-1]["num_updates"]


@contextmanager
def training_in_epoch_3(corpus: Path, folder: Path, optimizer: str) -> Iterator[subprocess.Popen]:
    """A train.py that has written the checkpoint of epoch 2."""
    command = ("-m", "recipes.translation.train", "quickstart", optimizer, folder, "--data", corpus, *FLAGS)
    with subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    ) as process:
        while not ((folder / "log").exists() and "(epoch 2 @" in (folder / "log").read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        yield process


def test_a_killed_run_goes_on_to_the_weights_of_an_undisturbed_one(
    corpus: Path, runs: list[Path], tmp_path: Path
):
    killed = tmp_path / "asam"
    with training_in_epoch_3(corpus, killed, "asam") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    log = killed / "log"
    assert children and "done training" not in log.read_text()

    succeeded(train(corpus, killed, "asam"))
    assert "Loaded checkpoint" in log.read_text()
    assert_same_state(checkpoint(killed), checkpoint(runs[1]))
    succeeded(script("score", corpus, killed))
    results = compared(tmp_path, [runs[1], killed])
    assert [system["epochs"] for system in results["systems"]] == [5, 5]
    assert len({system["best_valid_loss"] for system in results["systems"]}) == 1


def test_a_training_that_outlived_its_script_is_waited_for(corpus: Path, tmp_path: Path):
    with training_in_epoch_3(corpus, tmp_path / "adam", "adam") as process:
        process.kill()
    succeeded(train(corpus, tmp_path / "adam", "adam"))
    log = (tmp_path / "adam" / "log").read_text()
    # It waited, and then resumed a training that had nothing left to do.
    assert log.index("done training") < log.index("Loaded checkpoint")
    assert made_updates(tmp_path / "adam") == planned_updates(tmp_path / "adam")


def test_other_options_for_the_same_folder_are_refused(corpus: Path, runs: list[Path], tmp_path: Path):
    longer = tmp_path / "longer"
    shutil.copytree(corpus, longer)
    with open(longer / "bin" / "test.de-en.en.idx", "ab") as index:
        index.write(b"0")
    for setup, optimizer, data, flags, difference in (
        ("libreoffice_8000", "adam", corpus, (), "setup quickstart, not libreoffice_8000"),
        ("quickstart", "sam", corpus, (), "optimizer adam, not sam"),
        ("quickstart", "adam", corpus, ("--seed", "2"), "seed 1, not 2"),
        ("quickstart", "adam", corpus, ("--lr", "0.02"), "flags ["),
        ("quickstart", "adam", longer, (), "data of checksum "),
    ):
        sentence = refusal("train", setup, optimizer, runs[0], "--data", data, *FLAGS, *flags)
        assert sentence.startswith(f"'{runs[0]}' holds a run with {difference}")


def test_bad_input_is_named_in_one_sentence_before_anything_is_made(corpus: Path, tmp_path: Path):
    nothing, arguments = tmp_path / "nothing", ("quickstart", "adam", tmp_path / "run", "--data")
    sentence = refusal("train", *arguments, nothing)
    assert sentence.startswith(
        f"'{nothing}' holds no corpus: make it with 'python -m data_prep.libreoffice_help "
    )
    sentence = refusal("train", *arguments, corpus, "--no-such-flag")
    assert sentence == "fairseq-train: unrecognized arguments: --no-such-flag"
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_of_unknown_options_are_refused(corpus: Path, tmp_path: Path):
    (tmp_path / "checkpoint_last.pt").touch()
    sentence = refusal("train", "quickstart", "adam", tmp_path, "--data", corpus)
    assert sentence.startswith(f"'{tmp_path}' holds checkpoints of unknown options")


@pytest.mark.slow
def test_a_launcher_starts_several_workers(corpus: Path, tmp_path: Path):
    """fairseq takes ranks from torchrun on GPUs alone; on a CPU they have to be passed on."""
    worker = tmp_path / "worker"
    worker.write_text(
        '#!/bin/sh\nexec "$@" --distributed-rank "$RANK" --distributed-init-method env:// '
        "--distributed-no-spawn"
    )
    worker.chmod(0o755)
    gloo = ("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--max-epoch", "1")
    gloo += ("--distributed-world-size", "2", "--update-freq", "3")
    launcher = f"torchrun --nproc_per_node 2 --no-python {worker}"
    succeeded(train(corpus, tmp_path / "run", "asam", *gloo, LAUNCHER=launcher))
    log = (tmp_path / "run" / "log").read_text()
    assert log.count("training on 2 devices") == 1
    assert log.count("done training") == 1
    assert made_updates(tmp_path / "run") == planned_updates(tmp_path / "run")
