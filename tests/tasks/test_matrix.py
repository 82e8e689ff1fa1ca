"""Every pair of options at once: equal to the plain reference, or refused in a sentence."""

import pytest

from .matrix import AXES, REFUSED, all_pairs, measure, name, pairs, verdict, wanted_pairs

COMBINATIONS = all_pairs()


def fast(count: int) -> list:
    """The combinations that test the most pairs of values, one after the other."""
    chosen, tested = [], set()
    for _ in range(count):
        chosen.append(max(COMBINATIONS, key=lambda c: len(pairs(c) - tested)))
        tested |= pairs(chosen[-1])
    return chosen


FAST = fast(13)


def test_every_pair_of_options_occurs():
    tested = set().union(*map(pairs, COMBINATIONS))
    assert len(COMBINATIONS) >= 60
    assert tested >= set(wanted_pairs())
    assert {pair for c in FAST for pair in c.items()} == {(a, v) for a in AXES for v in AXES[a]}


@pytest.mark.parametrize(
    "combination",
    [pytest.param(c, id=name(c), marks=[] if c in FAST else pytest.mark.slow) for c in COMBINATIONS],
)
def test_combination(corpus, combination):
    result = measure(combination, corpus / "bin")
    precision, allowed = combination["precision"], ["equal"]
    # With fp16, only where the base optimizer alone is off by half of what epsilon does.
    if precision == "bf16" or (precision == "fp16" and result["base"] > result["effect"] / 2):
        allowed.append("within rounding")
    assert verdict(combination, result) in allowed, result


@pytest.mark.parametrize("combination, flags, sentence", REFUSED)
def test_refused(corpus, combination, flags, sentence):
    refusal = measure(combination, corpus / "bin", *flags)["refusal"]
    assert sentence in refusal and "\n" not in refusal
