from __future__ import annotations

from pathlib import Path

from tests.recipes.translation.scripts import script, succeeded


def test_five_samples_of_every_run(runs: list[Path], tmp_path: Path):
    succeeded(script("samples", tmp_path / "samples.md", *runs))
    samples = (tmp_path / "samples.md").read_text()
    assert samples.count("| source |") == samples.count("| asam |") == 5
