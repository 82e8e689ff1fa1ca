from __future__ import annotations

import argparse

import pytest

from recipes.options import at_least_1


@pytest.mark.parametrize("text, value", [("1", 1), ("12", 12)])
def test_a_whole_number_from_1_is_taken(text: str, value: int):
    assert at_least_1(text) == value


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "two", ""])
def test_anything_else_is_refused_in_a_sentence(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^must be a whole number from 1, not {text}$"):
        at_least_1(text)
