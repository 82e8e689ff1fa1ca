from __future__ import annotations

from pathlib import Path

from tests.recipes.translation.scripts import script, succeeded


def test_curves_are_drawn(runs: list[Path], tmp_path: Path):
    succeeded(script("curves", tmp_path / "curves.png", *runs))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
