from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.translation.curves import draw
from tests.recipes.translation.scripts import script, succeeded


def test_curves_are_drawn(runs: list[Path], tmp_path: Path):
    succeeded(script("curves", tmp_path / "curves.png", *runs))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("other", [[15.0, 18.0], None])
def test_validation_bleu_is_drawn_where_all_runs_have_it(other: list[float] | None, tmp_path: Path):
    def log(name: str, bleu: list[float] | None) -> Path:
        lines = [f"now | INFO | train_inner | {json.dumps({'epoch': 1, 'update': 0.5, 'loss': '7'})}"]
        for epoch in (1, 2):
            scored = {} if bleu is None else {"valid_bleu": str(bleu[epoch - 1])}
            lines.append(f"now | INFO | valid | {json.dumps({'epoch': epoch, 'valid_loss': '6', **scored})}")
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    panels = draw({"adam": log("adam", [10.0, 20.0]), "asam": log("asam", other)}).axes
    assert len(panels) == (2 if other is None else 3)
    if other is not None:
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in panels[1].get_lines()]
        assert drawn == [([1, 2], [10, 20]), ([1, 2], other)]
        assert panels[1].get_ylabel() == "BLEU"
