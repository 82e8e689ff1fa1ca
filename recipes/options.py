"""Types of command-line options that several recipes share."""

from __future__ import annotations

import argparse


def at_least_1(text: str) -> int:
    """Return the whole number in *text*, as a ``type`` of argparse.

    Raises:
        ArgumentTypeError: It is no whole number, or below 1.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text}")
    return number
