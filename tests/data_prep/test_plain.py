"""A corpus from a user's own text files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from data_prep import generated
from data_prep.corpus import STATISTICS
from data_prep.segmentation import BINARIZED, MODEL, VOCABULARY, text_files
from tests.data_prep.commands import assert_refused, lines, run

COUNTS = {"train": 200, "valid": 10, "test": 20}
SMALL = ("--vocab-size", "150", "--workers", "1")


def write_files(folder: Path, source: str = "de", target: str = "en") -> list[object]:
    """Write the files of each split, and return the options that name them."""
    pairs = iter(generated.pairs(sum(COUNTS.values()), seed=1))
    options: list[object] = []
    for name, count in COUNTS.items():
        drawn = [next(pairs) for _ in range(count)]
        options.append(f"--{name}")
        for side, language in enumerate((source, target)):
            options.append(folder / f"{name}.{language}")
            options[-1].write_text("".join(pair[side] + "\n" for pair in drawn), encoding="utf-8")
    return options


def test_files_become_a_corpus_of_their_languages(tmp_path):
    options = write_files(tmp_path, "pt_BR", "xx")
    folder = tmp_path / "corpus"
    result = run("plain", folder, *options, *SMALL)
    assert result.returncode == 0, result.stderr
    texts = text_files(("pt_BR", "xx"))
    assert {file.name for file in folder.iterdir()} == {*texts, MODEL, VOCABULARY, BINARIZED, STATISTICS}
    for name in texts:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    assert (folder / BINARIZED / "train.pt_BR-xx.xx.idx").exists()
    statistics = json.loads((folder / STATISTICS).read_text())
    assert statistics["pairs"] == COUNTS
    assert list(statistics["words"]["train"]) == ["brazilian", "xx"]

    assert "nothing to do" in run("plain", folder, *options, *SMALL).stdout
    with (tmp_path / "train.xx").open("a") as file:
        file.write("One more line.\n")
    with (tmp_path / "train.pt_BR").open("a") as file:
        file.write("Uma linha a mais.\n")
    assert_refused(run("plain", folder, *options, *SMALL), folder, "was prepared with checksum")


def test_white_space_becomes_single_spaces_and_no_line_is_lost(tmp_path):
    options = write_files(tmp_path)
    odd = "\ufeffEin\tWort.\r\n\r\nEine\u2028 Zeile\x0bmit\rallem. \r\nohne Ende".encode()
    (tmp_path / "test.de").write_bytes(odd)
    (tmp_path / "test.en").write_bytes(b"A word.\n\nA line with all.\nno end\n")
    folder = tmp_path / "corpus"
    assert run("plain", folder, *options, *SMALL).returncode == 0
    assert lines(folder, "test.de") == ["Ein Wort.", "", "Eine Zeile mit allem.", "ohne Ende"]
    assert lines(folder, "test.en") == ["A word.", "", "A line with all.", "no end"]


@pytest.mark.parametrize(
    ("file", "content", "telling"),
    [
        ("train.en", b"One line.\n", ["train.de has 200 lines", "train.en has 1"]),
        ("valid.de", b"", ["valid.de: is empty"]),
        ("valid.de", b" \n\n", ["valid.de: is empty"]),
        ("test.en", b"A line.\nGr\xfc\xdfe\n", ["test.en: line 2 is not UTF-8 (byte 0xfc at place 3)"]),
        ("test.de", None, ["test.de: cannot be read (No such file or directory)"]),
    ],
)
def test_bad_files_are_refused(file, content, telling, tmp_path):
    options = write_files(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    assert_refused(run("plain", tmp_path / "corpus", *options, *SMALL), *telling)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("option", "names", "telling"),
    [
        ("--train", ("a.de", "b.de"), "--train a.de b.de: both are of the language de"),
        ("--valid", ("a.en", "a.de"), "--valid a.en a.de: must end in .de and .en, in this order"),
        ("--train", ("a", "a.en"), "a: its name must end in a dot and a language"),
        (
            "--train",
            ("a.pt-BR", "a.en"),
            "a.pt-BR: its name must end in a dot and a language without a hyphen",
        ),
    ],
)
def test_names_that_tell_no_two_languages_are_refused(option, names, telling, tmp_path):
    options = write_files(tmp_path)
    place = options.index(option)
    options[place + 1 : place + 3] = names
    assert_refused(run("plain", tmp_path / "corpus", *options, *SMALL), telling)


def test_letters_stay_as_they_are_and_long_lines_count(tmp_path):
    """Also those that Unicode calls equal to others: of their pieces, the text is made again."""
    options = write_files(tmp_path, "zh", "en")
    line = "今天天气很好，我们去公园散步吧！（１）…"  # noqa: RUF001
    (tmp_path / "train.zh").write_text("".join([line + "\n"] * 199 + ["ж ўцк " * 800 + "\n"]), "utf-8")
    folder = tmp_path / "corpus"
    assert run("plain", folder, *options, *SMALL).returncode == 0
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    for text in (line, "ж ўцк"):
        ids = pieces.encode(text)
        assert pieces.decode(ids) == text and pieces.unk_id() not in ids
