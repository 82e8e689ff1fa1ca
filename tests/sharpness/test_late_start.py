from __future__ import annotations

import math

import pytest

from fairseq_asam.sharpness.late_start import first_ascent, validate_start


@pytest.mark.parametrize(
    "ascent_from, updates, expected",
    [
        (0, 10, 0),
        (0, math.inf, 0),
        (0.5, 30, 15),
        (0.55, 30, 16),
        (0.99, 1000, 990),
        (1, 30, 1),
        (29, 30, 29),
        (5, math.inf, 5),
    ],
)
def test_the_first_ascent_is_a_number_or_after_a_share(ascent_from, updates, expected):
    assert first_ascent(ascent_from, updates) == expected


@pytest.mark.parametrize(
    "ascent_from, updates, message",
    [
        (30, 30, "ascent_from is 30, but training ends after 30 updates, so that none"),
        (0.99, 30, "ascent_from is 0.99, but training ends after 30 updates, so that none"),
        (0.5, math.inf, "ascent_from is 0.5, a share of all updates, but their number is unknown: give"),
    ],
)
def test_a_start_that_never_comes_is_refused(ascent_from, updates, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        first_ascent(ascent_from, updates)


@pytest.mark.parametrize("ascent_from", [-1.0, 1.5, math.nan, math.inf])
def test_bad_input_is_named_in_a_sentence(ascent_from):
    with pytest.raises(ValueError, match=f"^ascent_from is {ascent_from}, but it must be a share"):
        validate_start(ascent_from)
