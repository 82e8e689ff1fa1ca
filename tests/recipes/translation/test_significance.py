"""The test over seeds and sentences, against sacrebleu and against cases whose answer is known."""

from __future__ import annotations

import random

import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from recipes.translation.significance import paired_bootstrap, t_test

WORDS = ["the", "a", "page", "menu", "opens", "closes", "file", "table", "cell", "row", "with", "of", "new"]


def noisy(references: list[str], share: float, seed: int) -> list[str]:
    """Return translations in which a random *share* of the words is another one."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(WORDS) if draw.random() < share else word for word in line.split())
        for line in references
    ]


@pytest.fixture(scope="module")
def references() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 15))) for _ in range(200)]


@pytest.mark.parametrize(("metric", "scorer"), [("BLEU", BLEU()), ("chrF2", CHRF())])
def test_with_one_seed_it_agrees_with_sacrebleus_approximate_randomization(references, metric, scorer):
    baseline, system = noisy(references, 0.3, 1), noisy(references, 0.25, 2)
    ours = paired_bootstrap(metric, [baseline], [system], references)
    scores = [scorer.corpus_score(lines, [references]).score for lines in (baseline, system)]
    assert ours["difference"] == pytest.approx(scores[1] - scores[0], abs=1e-9)
    named = [("baseline", baseline), ("system", system)]
    _, theirs = PairedTest(named, {metric: scorer}, [references], test_type="ar", n_samples=2000)()
    assert ours["p_value"] == pytest.approx(theirs[metric][1].p_value, abs=0.05)
    assert 0.01 < ours["p_value"] < 0.9
    low, high = ours["interval"]
    assert low < ours["difference"] < high


def test_a_difference_that_seeds_do_not_share_is_not_significant(references):
    baseline = [noisy(references, 0.3, seed) for seed in range(5)]
    better = [noisy(references, 0.24, 10 + seed) for seed in range(5)]
    assert paired_bootstrap("BLEU", baseline, better, references)["p_value"] < 0.01
    # One seed is much better, the others are a little worse.
    mixed = [noisy(references, share, 10 + seed) for seed, share in enumerate([0.1, 0.33, 0.33, 0.33, 0.33])]
    found = paired_bootstrap("BLEU", baseline, mixed, references)
    assert found["p_value"] > 0.1
    assert found["interval"][0] < 0 < found["interval"][1]


def test_the_same_system_differs_by_nothing(references):
    runs = [noisy(references, 0.3, seed) for seed in range(3)]
    found = paired_bootstrap("BLEU", runs, runs, references)
    assert found == {"difference": 0.0, "interval": [0.0, 0.0], "p_value": 1.0}


def test_the_t_interval_is_the_textbooks():
    """Student's sleep data, as in the help of R's t.test: t = -4.0621, 9 degrees of freedom, p = 0.002833."""
    drug_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    drug_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = t_test(drug_2, drug_1)
    assert found["t_interval"] == pytest.approx([-2.4598858, -0.7001142], abs=1e-7)
    assert found["t_p_value"] == pytest.approx(0.002833, abs=1e-6)


def test_a_t_interval_over_five_seeds_is_wider_than_that_of_a_bootstrap(references):
    baseline = [noisy(references, 0.3, seed) for seed in range(5)]
    mixed = [noisy(references, share, 10 + seed) for seed, share in enumerate([0.1, 0.33, 0.33, 0.33, 0.33])]
    scores = [[BLEU().corpus_score(run, [references]).score for run in runs] for runs in (baseline, mixed)]
    bootstrap = paired_bootstrap("BLEU", baseline, mixed, references)["interval"]
    wider = t_test(*scores)["t_interval"]
    assert wider[0] < bootstrap[0] and bootstrap[1] < wider[1]


def test_the_t_interval_where_there_is_no_spread():
    assert t_test([1.0], [2.0]) == {"t_interval": None, "t_p_value": None}
    assert t_test([1.0, 2.0], [2.0, 3.0]) == {"t_interval": [1.0, 1.0], "t_p_value": 0.0}
    assert t_test([1.0, 2.0], [1.0, 2.0]) == {"t_interval": [0.0, 0.0], "t_p_value": 1.0}
