"""Tables between markers and figures with keys: what is wrong is found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from recipes import documents
from recipes.reporter import markdown_table

FOUND = {
    "systems": [
        {"system": "SAM", "difference": 0.4356, "interval": [-1.0849, 1.956], "words": 1234},
        {"system": "ASAM", "difference": -0.0561, "interval": [-0.8139, 1.6968], "words": 99},
    ],
    "cells": [
        {"row": "40%", "column": "SAM", "mean": 94.667, "share": 0.0731},
        {"row": "40%", "column": "SGD", "mean": 83.111, "share": 0.0072},
    ],
}


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A page beside result.json, and the table `systems` of that file."""
    (tmp_path / "result.json").write_text(json.dumps(FOUND))

    def systems() -> str:
        rows = json.loads((tmp_path / "result.json").read_text())["systems"]
        return markdown_table(["", "difference"], [[r["system"], f"{r['difference']:+.2f}"] for r in rows])

    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    monkeypatch.setattr(documents, "TABLES", {"systems": systems})
    monkeypatch.setattr(documents, "documents", lambda: [tmp_path / "page.md"])
    (tmp_path / "page.md").write_text(
        "Before.\n<!-- table: python -m recipes.documents systems -->\nold\n<!-- end -->\nAfter.\n"
    )
    return tmp_path / "page.md"


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["documents", *arguments])
    documents.main()


def test_the_command_prints_tables_in_their_places(page, monkeypatch, capsys):
    run(monkeypatch)
    text = page.read_text()
    assert text.startswith("Before.\n<!-- table: python -m recipes.documents systems -->\n| | difference |\n")
    assert text.endswith("| SAM | +0.44 |\n| ASAM | -0.06 |\n<!-- end -->\nAfter.\n")
    run(monkeypatch, "--check")
    run(monkeypatch, "systems")
    assert "| SAM | +0.44 |" in capsys.readouterr().out
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("right", "wrong"), [("+0.44", "+0.43"), ("SAM | +0.44", "SAM | -0.06"), ("-0.06", "-0.6")]
)
def test_a_changed_table_is_found(page, monkeypatch, right, wrong):
    run(monkeypatch)
    text = page.read_text()
    assert right in text
    page.write_text(text.replace(right, wrong))
    with pytest.raises(SystemExit, match="a table is not that of its file"):
        run(monkeypatch, "--check")
    assert wrong in page.read_text()


def test_a_marker_that_is_wrong_is_found(page, monkeypatch):
    run(monkeypatch)
    text = page.read_text()
    page.write_text(text.replace("<!-- end -->", ""))
    with pytest.raises(SystemExit, match="has no '<!-- end -->'"):
        run(monkeypatch)
    page.write_text(text.replace("documents systems", "documents system"))
    with pytest.raises(SystemExit, match="there is no table 'system'"):
        run(monkeypatch)


RIGHT = [
    ("+0.44", "systems/SAM/difference"),
    ("+0.4", "systems/0/difference"),
    ("-0.06", "systems/-1/difference"),
    ("+0.44 (-1.08 to +1.96)", "systems/SAM/difference; systems/SAM/interval"),
    ("94.7 with SAM, 83.1 with SGD", "cells/40% & SAM/mean; cells/40% & SGD/mean"),
    ("7.3% to 0.7%", "cells/0/share; cells/1/share"),
    ("1,234 words", "systems/SAM/words"),
]
WRONG = [
    ("+0.45", "systems/SAM/difference"),
    ("0.44", "systems/ASAM/difference"),
    ("+0.06", "systems/ASAM/difference"),
    ("+0.44 (-1.08 to +1.97)", "systems/SAM/difference; systems/SAM/interval"),
    ("-0.06 and +0.44", "systems/SAM/difference; systems/ASAM/difference"),
    ("+0.44", "systems/SAM/difference; systems/ASAM/difference"),
    ("+0.44 and -0.06", "systems/SAM/difference"),
    ("+0.44", "systems/Adam/difference"),
    ("+0.44", "systems/SAM/system"),
    ("94.7", "cells/40%/mean"),
    ("0.07%", "cells/0/share"),
]


@pytest.mark.parametrize(("text", "key"), RIGHT)
def test_a_figure_is_what_stands_at_its_key(page, text, key):
    page.write_text(f'It gains [{text}](result.json "{key}").')
    assert documents.wrong_figures(page) == []


@pytest.mark.parametrize(("text", "key"), WRONG)
def test_a_figure_that_is_not_at_its_key_is_found(page, text, key):
    page.write_text(f'It gains [{text}](result.json "{key}").')
    (sentence,) = documents.wrong_figures(page)
    assert text in sentence and "page.md" in sentence


def test_a_figure_without_a_key_is_found(page):
    page.write_text("It gains [+0.44](result.json), as [+0.44](table.md) says.")
    assert len(documents.wrong_figures(page)) == 2
    page.write_text(
        "[Figures](result.json) after [60 epochs](table.md), and [+0.44](https://example.org/a.json)."
    )
    assert documents.wrong_figures(page) == []
