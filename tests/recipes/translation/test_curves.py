from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.translation.curves import draw
from tests.recipes.translation.scripts import script, succeeded


def test_curves_are_drawn(runs: list[Path], tmp_path: Path):
    succeeded(script("curves", tmp_path / "curves.png", *runs))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def log(tmp_path: Path):
    """Write the log of a run with these validation scores, and return its file."""

    def written(name: str, bleu: list[float] | None, epochs: int = 2) -> Path:
        lines = [f"now | INFO | train_inner | {json.dumps({'epoch': 1, 'update': 0.5, 'loss': '7'})}"]
        for epoch in range(1, epochs + 1):
            scored = {} if bleu is None else {"valid_bleu": str(bleu[epoch - 1])}
            lines.append(f"now | INFO | valid | {json.dumps({'epoch': epoch, 'valid_loss': '6', **scored})}")
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    return written


@pytest.mark.parametrize("other", [[15.0, 18.0], None])
def test_validation_bleu_is_drawn_where_all_runs_have_it(other: list[float] | None, log):
    panels = draw({"adam": [log("adam", [10.0, 20.0])], "asam": [log("asam", other)]}).axes
    assert len(panels) == (2 if other is None else 3)
    if other is not None:
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in panels[1].get_lines()]
        assert drawn == [([1, 2], [10, 20]), ([1, 2], other)]
        assert panels[1].get_ylabel() == "BLEU"
        assert not panels[1].collections


def test_several_seeds_are_drawn_as_their_mean_in_a_band_as_far_as_all_have_come(log):
    seeds = [log("1", [10.0, 20.0, 30.0], epochs=3), log("2", [14.0, 22.0])]
    axes = draw({"adam": seeds}).axes[1]
    [line], [band] = axes.get_lines(), axes.collections
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [12, 21])
    assert {tuple(point) for path in band.get_paths() for point in path.vertices} == {
        (1, 10), (2, 20), (1, 14), (2, 22)
    }  # fmt: skip


def test_a_run_before_its_first_validation_is_drawn_too(log):
    [line] = draw({"adam": [log("adam", None, epochs=0)]}).axes[0].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.5], [7])
