"""Late start: plain updates first, sharpness-aware ones from then on (Zhou et al., arXiv 2410.10373)."""

from __future__ import annotations

import math


def validate_start(ascent_from: float) -> None:
    """Raise ValueError if *ascent_from* is neither a share nor the number of an update."""
    if not 0.0 <= ascent_from < math.inf or (ascent_from > 1.0 and ascent_from % 1.0):
        raise ValueError(
            f"ascent_from is {ascent_from}, but it must be a share of all updates, at least 0 and below 1, "
            "or the whole number of an update"
        )


def first_ascent(ascent_from: float, updates: float) -> int:
    """Return the number of the first sharpness-aware update, counted from 0.

    Args:
        ascent_from: that number; below 1, the share of all updates that come before it.
        updates: of the whole training; infinity if it is unknown.

    Raises:
        ValueError: *ascent_from* is neither, or it is a share of an unknown number, or training ends before
            the first sharpness-aware update.
    """
    validate_start(ascent_from)
    is_share = 0.0 < ascent_from < 1.0
    if is_share and updates == math.inf:
        raise ValueError(
            f"ascent_from is {ascent_from}, a share of all updates, but their number is unknown: give the "
            "number of an update, or set when training ends"
        )
    first = round(ascent_from * updates) if is_share else int(ascent_from)
    if first >= updates:
        raise ValueError(
            f"ascent_from is {ascent_from:g}, but training ends after {updates} updates, so that none would "
            "be sharpness-aware: choose a smaller value"
        )
    return first
