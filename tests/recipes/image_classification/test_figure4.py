import math

import pytest


def test_the_grid_of_rho_is_the_paper_s_for_each_normalization(commands):
    runs = commands("figure4", "--seeds", "1")
    variants = {(run.normalization, run.p_norm, run.normalize_bias) for run in runs}
    assert variants == {
        ("element-wise", math.inf, False),
        ("element-wise", 2.0, False),
        ("element-wise", 2.0, True),
        ("filter-wise", 2.0, False),
    }
    rhos = [run.rho for run in runs if run.p_norm == math.inf]
    digits = [0.5e-4, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0]
    assert rhos == pytest.approx(digits)
    assert {(run.model, run.optimizer) for run in runs} == {("wrn16_8", "asam")}


def test_on_digits_a_cube_has_smaller_radii_than_a_ball(commands):
    runs = commands("figure4", "--digits", "--seeds", "1")
    assert {run.rho for run in runs if run.p_norm == math.inf} == {0.001, 0.005, 0.02}
    assert {run.rho for run in runs if run.p_norm == 2} == {0.2, 1.0, 2.0}
