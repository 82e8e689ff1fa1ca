"""Tables and pictures of results."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from recipes.reporter import (
    best_rho,
    format_number,
    markdown_table,
    mean_and_sd,
    table_of,
    write_figure,
    write_text,
)


def test_the_mean_and_the_sample_standard_deviation():
    assert mean_and_sd([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_and_sd([4.0]) == (4.0, None)
    assert mean_and_sd([]) == (None, None)


def test_numbers_as_a_table_shows_them():
    assert format_number(12.346, 0.678) == "12.35 ± 0.68"
    assert format_number(0.5, digits=3) == "0.500"
    assert format_number(0.0, 0.0) == "0.00 ± 0.00"
    assert format_number(None) == ""


def test_a_table_in_markdown():
    assert markdown_table(["rho", "SAM"], [["0.1", "9"], ["0.2", ""]]) == (
        "| rho | SAM |\n|:--|--:|\n| 0.1 | 9 |\n| 0.2 |  |\n"
    )
    assert markdown_table(["", "BLEU", "chrF"], []) == "| | BLEU | chrF |\n|:--|--:|--:|\n"


def test_the_best_rho_has_the_highest_score_and_is_the_smaller_of_equals():
    assert best_rho({0.1: 30.0, 0.2: 31.0, 0.5: 29.0}) == 0.2
    # Means of the same counts can differ in their last digit; a table shows them as equal.
    assert best_rho({0.5: 98.83333333333334, 0.02: 98.83333333333333, 2.0: 98.5}) == 0.02
    assert best_rho({0.1: None, 0.2: 0.0}) == 0.2
    with pytest.raises(ValueError, match=r"none of the values of rho 0\.1, 0\.2 has a score"):
        best_rho({0.1: None, 0.2: None})


def test_files_are_written_whole_with_their_folders(tmp_path):
    write_text(tmp_path / "a" / "b.md", "ä\n")
    assert (tmp_path / "a" / "b.md").read_bytes() == "ä\n".encode()
    write_figure(tmp_path / "c" / "d.png", Figure())
    assert (tmp_path / "c" / "d.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.rglob("*.*"))) == 2


def test_a_table_of_rows_has_the_format_of_each_column():
    rows = [{"optimizer": "asam", "ratio": 1.987, "sent": {"bytes": 24}}]
    table = table_of(rows, ("", "`{optimizer}`"), ("time", "{ratio:.2f}"), ("sent", "{sent[bytes]}"))
    assert table == "| | time | sent |\n|:--|--:|--:|\n| `asam` | 1.99 | 24 |\n"
