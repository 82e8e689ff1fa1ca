"""What every corpus is refused for."""

from __future__ import annotations

import argparse

import pytest

from data_prep import PreparationError, corpus


@pytest.mark.parametrize("languages", [("de", "de"), ("pt-BR", "en"), ("", "en")])
def test_what_are_no_two_languages_of_fairseq_is_refused(languages, tmp_path):
    """One would overwrite the other's text, and a hyphen parts the two in the names of fairseq's files."""

    def source(_):
        raise AssertionError("work has begun")

    arguments = argparse.Namespace(destination=tmp_path / "corpus", vocab_size=200, workers=1)
    with pytest.raises(PreparationError, match="must be two languages without a hyphen"):
        corpus.prepare(arguments, languages, source)
    assert not (tmp_path / "corpus").exists()
