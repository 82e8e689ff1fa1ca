"""The statements of Section 5.1 and Figure 1 about the toy loss."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from fairseq_asam import Region
from recipes.paper.toy import METHODS, POINTS, REGIONS, STARTS, maximum, trajectory
from tests.commands import ROOT

STEP = 0.01  # a learning rate larger than the picture's, for fewer steps


def path_of(method: str, start: tuple) -> np.ndarray:
    return np.array(trajectory(start, METHODS[method], STEP, 1000))


def in_the_valley(path: np.ndarray) -> np.ndarray:
    """Which points of the path have w_1 w_2 = 0.04, up to the length of a step."""
    gradient = np.linalg.norm(path, axis=1)
    return np.abs(path[:, 0] * path[:, 1] - 0.04) < 2 * STEP * gradient**2


def test_sam_drifts_along_the_valley_towards_its_flattest_point():
    path = path_of("SAM", (0.2, 0.05))
    entry = np.argmax(in_the_valley(path))
    assert in_the_valley(path)[entry:].all()
    distances = np.linalg.norm(path[entry:] - [0.2, 0.2], axis=1)
    assert distances[0] > 0.04
    assert distances[-100:].max() < 0.005


def test_sam_does_not_leave_the_second_start():
    """w + epsilon has w_2 < 0, where the loss is flat."""
    path = path_of("SAM", (0.3, 0.033))
    assert (path == path[0]).all()
    assert not in_the_valley(path).any()
    nearer = np.array(trajectory((0.3, 0.033), Region(0.02, normalization="none"), STEP, 400))
    assert in_the_valley(nearer)[-100:].all()


@pytest.mark.parametrize("start", STARTS)
def test_asam_stays_near_where_it_entered_the_valley(start):
    path = path_of("ASAM", start)
    entry = np.argmax(in_the_valley(path))
    assert 0 < entry < 300
    assert in_the_valley(path)[entry:].all()
    assert np.linalg.norm(path[entry:] - path[entry], axis=1).max() < 0.02
    assert np.linalg.norm(path[-1] - [0.2, 0.2]) > 0.05


@pytest.mark.parametrize("start", STARTS)
def test_asam_reaches_the_valley_if_rho_is_below_the_root_of_two(start):
    for rho in (0.1, 1.0, 1.4):
        slower = 1 - rho / math.sqrt(2)  # the gradient at w + epsilon is so much smaller than at w
        path = np.array(trajectory(start, Region(rho, eta=0.0), STEP / slower, 300))
        assert np.abs(path[:, 0] * path[:, 1] - 0.04).min() < 1e-3, rho
    path = np.array(trajectory(start, Region(1.42, eta=0.0), STEP, 50))
    assert (path == path[0]).all()


def test_figure_1():
    """Adaptive sharpness at w and w' is the same, in closed form; sharpness differs."""
    rho, loss = 0.5, 0.96
    for point in POINTS:
        assert maximum(point, REGIONS["cuboid"])[0] == pytest.approx((1 + rho) ** 2 - 0.04 - loss)
        assert maximum(point, REGIONS["ellipsoid"])[0] == pytest.approx((1 + rho / math.sqrt(2)) ** 2 - 1)
    angles = np.linspace(0, 2 * np.pi, 100_001)
    for x, y in POINTS:
        circle = np.abs((x + rho * np.cos(angles)) * np.maximum(y + rho * np.sin(angles), 0) - 0.04)
        assert maximum((x, y), REGIONS["sphere"])[0] == pytest.approx(circle.max() - loss, rel=1e-6)


def test_along_a_contour_sharpness_is_least_where_the_weights_are_equal():
    """Section 5.1 says "maximized", but that SAM tries to converge there needs the minimum."""
    region = Region(0.05, normalization="none")
    along = {w: maximum((w, 0.06 / w), region)[0] for w in (0.1, 0.2, math.sqrt(0.06), 0.3, 0.4)}
    assert min(along, key=along.get) == math.sqrt(0.06)


def test_the_command_writes_pictures_and_numbers(tmp_path):
    command = [sys.executable, "-m", "recipes.paper.toy", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert "SAM from (0.3, 0.033) to (0.3000, 0.0330)" in process.stdout
    for picture in ("figure1.png", "figure3.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "toy.json").read_text())
    assert len(numbers["figure_1"]) == 6 and len(numbers["figure_3"]) == 4
    assert {file.name for file in tmp_path.iterdir()} == {"figure1.png", "figure3.png", "toy.json"}
