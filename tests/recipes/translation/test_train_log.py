from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from recipes.translation.train_log import read_progress, training_seconds
from tests.recipes.translation.scripts import compared, script, succeeded


@pytest.mark.parametrize("epoch", [2, 5])
def test_an_epoch_killed_between_its_checkpoint_and_its_training_figures_counts(
    epoch: int, runs: list[Path], tmp_path: Path
):
    killed = tmp_path / "killed"
    shutil.copytree(runs[1], killed)
    log = killed / "log"
    whole = log.read_text().splitlines(keepends=True)
    trained = [line for line in whole if "| train |" in line]
    lost = trained.pop(epoch - 1)
    log.write_text("".join(line for line in whole if line != lost))
    seconds = [float(re.search(r'"train_train_wall": "(\d+)"', line)[1]) for line in trained]
    assert len(seconds) == 4

    undisturbed, cut_off = compared(tmp_path, [runs[1], killed])["systems"]
    assert cut_off["epochs"] == undisturbed["epochs"] == 5
    assert cut_off["best_valid_loss"] == undisturbed["best_valid_loss"]
    assert cut_off["last_valid_loss"] == undisturbed["last_valid_loss"]
    assert (cut_off["last_train_loss"] == undisturbed["last_train_loss"]) == (epoch != 5)
    assert cut_off["training_seconds"] == pytest.approx(5 * np.mean(seconds))
    succeeded(script("curves", tmp_path / "curves.png", killed))


def test_progress_is_the_last_epoch_and_its_figures(runs: list[Path], tmp_path: Path):
    log = tmp_path / "log"
    log.touch()
    assert read_progress(log) == (0, {})
    lines = (runs[1] / "log").read_text().splitlines(keepends=True)
    trained = [number for number, line in enumerate(lines) if "| train |" in line]
    for epochs in (3, 5):
        log.write_text("".join(lines[: trained[epochs - 1] + 1]))
        made, figures = read_progress(log)
        assert made == epochs and {"loss", "valid_loss", "sharpness"} <= figures.keys()


def test_the_time_of_an_epoch_is_that_of_the_fastest_training(runs: list[Path], tmp_path: Path):
    whole = (runs[1] / "log").read_text()
    seconds = np.array([[9, 3, 4, 5, 6], [8, 7, 2, 5, 10]])
    logs = [tmp_path / "1.log", tmp_path / "2.log"]
    for log, walls in zip(logs, seconds):
        numbers = iter(walls)
        log.write_text(
            re.sub(r'(?<="train_train_wall": ")\d+', lambda found, numbers=numbers: f"{next(numbers)}", whole)
        )
    assert training_seconds(logs) == seconds.min(axis=0).sum()
    assert training_seconds(logs[:1]) == seconds[0].sum()
