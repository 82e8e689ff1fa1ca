"""What every corpus is refused for, and how its folder is made."""

from __future__ import annotations

import argparse
import json
import os
import threading
from pathlib import Path

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


SETTINGS = {"seed": 1}


def build(folder):
    """Makes a corpus of one part."""
    folder.mkdir()
    (folder / "part").write_text("text")
    corpus.write_statistics(folder, {"settings": SETTINGS})


def test_a_destination_that_is_a_link_stays_one(tmp_path):
    """As to a larger disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "corpus").symlink_to(tmp_path / "disk")
    corpus.complete(tmp_path / "corpus", SETTINGS, ("part",), build)
    assert (tmp_path / "corpus").is_symlink() and (tmp_path / "disk" / "part").read_text() == "text"
    assert sorted(os.listdir(tmp_path)) == ["corpus", "disk"]


def test_the_folder_in_which_one_is_may_be_the_destination(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    corpus.complete(Path("."), SETTINGS, ("part",), build)
    assert (tmp_path / "here" / "part").read_text() == "text"


def test_a_second_process_waits_and_finds_the_corpus_made(tmp_path, capsys):
    begun, builds, destination = threading.Event(), [], tmp_path / "corpus"

    def build_slowly(folder):
        builds.append(folder)
        begun.set()
        # Until the other one waits.
        while "Another process makes" not in capsys.readouterr().err:
            pass
        build(folder)

    first, second = (
        threading.Thread(target=corpus.complete, args=(destination, SETTINGS, ("part",), build_slowly))
        for _ in range(2)
    )
    first.start()
    begun.wait()
    second.start()
    for each in (first, second):
        each.join()
    assert len(builds) == 1 and sorted(os.listdir(tmp_path)) == ["corpus"]


@pytest.mark.parametrize("statistics", ['{"a": 1}', "[]", ""])
def test_a_folder_with_the_statistics_of_something_else_is_left_alone(statistics, tmp_path):
    (tmp_path / corpus.STATISTICS).write_text(statistics)
    with pytest.raises(PreparationError, match="is no corpus made here"):
        corpus.complete(tmp_path, SETTINGS, ("part",), build)
    assert (tmp_path / corpus.STATISTICS).read_text() == statistics


def test_a_corpus_of_another_command_is_left_alone(tmp_path):
    build(tmp_path / "corpus")
    settings = {"held_out": [10, 10], "seed": 1, "pairs": 300}
    (tmp_path / "corpus" / corpus.STATISTICS).write_text(json.dumps({"settings": settings}))
    with pytest.raises(PreparationError, match="was prepared with pairs 300, not None"):
        corpus.complete(tmp_path / "corpus", {"held_out": [10, 10], "seed": 1}, ("part",), build)
