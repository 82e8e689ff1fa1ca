from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.recipes.translation.scripts import refusal, script, succeeded


@pytest.mark.slow
def test_an_experiment_goes_on_from_its_archive_without_checkpoints(corpus: Path, tmp_path: Path):
    first, moved, file = tmp_path / "first", tmp_path / "moved", tmp_path / "runs.tar.xz"

    def table5(out: Path, *seeds: str) -> str:
        few = ("--seeds", *seeds, "--epochs", "2", "--rho", "0.1", "--jobs", "2", "--cpu")
        return succeeded(script("table5", "help_8000", "--data", corpus, "--out", out, *few)).stdout

    printed = table5(first, "1")
    # Of 4 trainings and their averages. Neither the scoring nor an unfinished run counts.
    (first / "unfinished").mkdir()
    (first / "unfinished" / "run.json").write_text(json.dumps({"options": {}, "finished": False}))
    assert ": 8 runs, " in succeeded(script("archive", first, file)).stdout
    moved.mkdir()
    subprocess.run(["tar", "xf", file, "-C", moved], check=True)
    endings = {path.suffix or path.name for path in moved.rglob("*") if path.is_file()}
    assert endings == {".json", ".hyp", "log"}
    assert not any(str(tmp_path) in path.read_text() for path in moved.rglob("*") if path.is_file())
    assert table5(moved, "1") == printed
    assert (moved / "table5.json").read_text() == (first / "table5.json").read_text()
    assert not list(moved.rglob("*.pt"))
    assert "seeds 1, 2;" in table5(moved, "1", "2")


def test_a_folder_without_runs_is_refused(tmp_path: Path):
    file = tmp_path / "runs.tar.xz"
    message = refusal("archive", tmp_path, file)
    assert message.startswith(f"archive.py: '{tmp_path}' holds no finished run with translations")
    assert not file.exists()
