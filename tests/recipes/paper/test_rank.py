"""Rank statistics against values computed by hand."""

import itertools

import numpy as np
import pytest

from recipes.paper import rank


def model(gap, value, other=0.0, **hyper_parameters):
    measures = {"sharpness": value, "adaptive sharpness": other}
    return {"hyper_parameters": hyper_parameters, "generalization_gap": gap, "measures": measures}


GRID = [
    model(1, 10, 7, lr=0.1, batch=8),
    model(2, 30, 5, lr=0.1, batch=16),
    model(3, 20, 8, lr=0.2, batch=8),
    model(5, 40, 6, lr=0.2, batch=16),
    model(4, 15, 9, lr=0.3, batch=8),
    model(6, 25, 4, lr=0.3, batch=16),
]


def test_hand_computed_values():
    """In the order of the gaps, sharpness is 10 30 20 15 40 25 and adaptive sharpness 7 5 8 9 6 4."""
    statistics = rank.rank_statistics(GRID)
    sharpness, adaptive = statistics["sharpness"], statistics["adaptive sharpness"]
    # falling: (30, 20), (30, 15), (30, 25), (20, 15), (40, 25)
    assert sharpness["tau"] == pytest.approx((10 - 5) / 15)
    # batch 8: 10, 20, 15 has one falling pair; batch 16, gaps 2 5 6: 30, 40, 25 has two
    assert sharpness["granulated"]["lr"] == pytest.approx((1 / 3 + -1 / 3) / 2)
    assert sharpness["granulated"]["batch"] == pytest.approx(1.0)
    assert sharpness["average"] == pytest.approx(0.5)
    # falling: (7,5) (7,6) (7,4) (5,4) (8,6) (8,4) (9,6) (9,4) (6,4)
    assert adaptive["tau"] == pytest.approx((6 - 9) / 15)
    assert adaptive["granulated"]["lr"] == pytest.approx((1 + -1 / 3) / 2)
    assert adaptive["granulated"]["batch"] == pytest.approx(-1.0)


def test_the_definition_of_jiang_et_al_over_a_random_grid():
    """psi_i averages, over the values of all other hyper-parameters, tau of the models that they leave."""
    random = np.random.default_rng(0)
    space = {"lr": [1, 2, 3], "batch": [8, 16, 32], "decay": [0.0, 0.1]}
    models = [
        model(random.normal(), random.normal(), **dict(zip(space, values)))
        for values in itertools.product(*space.values())
    ]
    statistics = rank.rank_statistics(models)["sharpness"]
    for name in space:
        taus = []
        for others in itertools.product(*(space[k] for k in space if k != name)):
            fixed = dict(zip((k for k in space if k != name), others))
            group = [m for m in models if all(m["hyper_parameters"][k] == v for k, v in fixed.items())]
            signs = [
                np.sign(a["generalization_gap"] - b["generalization_gap"])
                * np.sign(a["measures"]["sharpness"] - b["measures"]["sharpness"])
                for a, b in itertools.combinations(group, 2)
            ]
            taus.append(np.mean(signs))
        assert statistics["granulated"][name] == pytest.approx(np.mean(taus))
    assert statistics["average"] == pytest.approx(np.mean(list(statistics["granulated"].values())))


def test_models_that_are_missing_or_do_not_vary():
    """A set with one model left says nothing; one in which the measure is constant counts as 0."""
    statistics = rank.rank_statistics([GRID[0], GRID[2], GRID[3]])["sharpness"]
    assert statistics["granulated"] == {"lr": pytest.approx(1.0), "batch": pytest.approx(1.0)}
    alone = rank.rank_statistics([GRID[0], GRID[3]])["sharpness"]
    assert alone["granulated"] == {"lr": None, "batch": None} and alone["average"] is None
    constant = [model(1, 5, lr=0.1), model(2, 5, lr=0.2)]
    assert rank.rank_statistics(constant)["sharpness"]["granulated"]["lr"] == 0.0


def test_the_table_is_that_of_the_paper():
    text = rank.table(rank.rank_statistics(GRID))
    assert "| τ (rank corr.) | 0.333 | -0.200 |" in text
    assert "| batch | 1.000 | -1.000 |" in text


def test_what_cannot_be_ranked_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="model 1 of the list has the value nan, which cannot be ranked"):
        rank.rank_statistics([GRID[0], model(float("nan"), 2, lr=0.1, batch=8)])
