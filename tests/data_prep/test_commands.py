"""The two commands, run as a user runs them."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data_prep.cleaning import words
from data_prep.corpus import STATISTICS
from data_prep.package import INSTALLED, dictionary_from
from data_prep.segmentation import BINARIZED, EMBEDDINGS, MODEL, PHRASES, TEXTS, VOCABULARY
from tests.commands import ROOT
from tests.data_prep.commands import assert_refused, command, contents, lines, run

DICTIONARY = """\
# A comment :: as the dictionary has them
Hund {m} [zool.] | Hunde {pl} | Der Hund bellt laut. | Mein Hund heißt Bello. :: dog | dogs | \
The dog barks loudly. | My dog is called Bello.
Katze {f} | Die Katze schläft sehr viel. :: cat | The cat sleeps a lot.
bellen {vi} | Warum bellt er denn jetzt? :: to bark | Why does he bark now?
laut {adj} | Sprich bitte nicht so laut! :: loud; noisy | Please don't talk so loud!
schlafen {vi} | Ich habe schlecht geschlafen. | Das Kind schläft noch nicht. :: to sleep | \
I have slept badly. | The child isn't asleep yet.
Buch {n} | Bücher {pl} | Sie liest ein gutes Buch. :: book | books | She reads a good book.
lesen {vt} | Er kann noch nicht lesen. :: to read | He can't read yet.
gut {adj} | Das ist eine gute Frage. :: good | That is a good question.
Frage {f} | Fragen {pl} | Ich habe eine Frage. :: question | questions | I have a question.
etw. fragen {vt} | Er hat mich nach dir gefragt. :: to ask sth. | He has asked me about you.
Haus {n} | Häuser {pl} | Wir haben ein Haus gekauft. :: house | houses | We have bought a house.
kaufen {vt} | Was willst du denn kaufen? :: to buy | What do you want to buy?
Zug {m} | Der Zug fährt gleich ab. | Wir haben den Zug verpasst. :: train | \
The train is about to leave. | We have missed the train.
warten {vi} | Auf wen wartest du hier? :: to wait | Who are you waiting for?
Regen {m} | Der Regen hört nicht auf. :: rain | The rain does not stop.
Wasser {n} | Das Wasser ist zu kalt. :: water | The water is too cold.
kalt {adj} | Heute ist es sehr kalt. :: cold | It is very cold today.
jdn. kennen {vt} | Kennst du diesen Mann gut? :: to know sb. | Do you know this man well?
Mann {m} | Männer {pl} | Der alte Mann lacht gern. :: man | men | The old man likes to laugh.
"""
SMALL = ("--vocab-size", "150", "--held-out", "3", "--workers", "1")
PARTS = {*TEXTS, *PHRASES, MODEL, VOCABULARY, *EMBEDDINGS, BINARIZED, STATISTICS}


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("dictionary") / "de-en"
    file.write_text(DICTIONARY, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def package(dictionary, tmp_path_factory) -> Path:
    """A real Debian package with the small dictionary in it."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("needs dpkg-deb")
    tree = tmp_path_factory.mktemp("package")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: trans-de-en\nVersion: 0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
        "Description: a small dictionary\n"
    )
    (tree / "usr" / "share" / "trans").mkdir(parents=True)
    shutil.copy(dictionary, tree / "usr" / "share" / "trans" / "de-en")
    file = tmp_path_factory.mktemp("debian") / "trans-de-en.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, file], check=True, capture_output=True)
    return file


@pytest.fixture(scope="module")
def prepared(package, tmp_path_factory) -> tuple[Path, str]:
    """The corpus made from the package, and what the command printed."""
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    result = run("embedded", folder, "--package", package, *SMALL)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_folder_is_whole(prepared):
    folder, _ = prepared
    assert {file.name for file in folder.iterdir()} == PARTS
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    assert len(lines(folder, "test.de")) == len(lines(folder, "test.en")) == 3
    assert len(lines(folder, "valid.de")) == len(lines(folder, "valid.en")) == 3
    assert len(lines(folder, "train.de")) == len(lines(folder, "train.en")) > 8
    assert (folder / BINARIZED / "dict.de.txt").read_bytes() == (
        folder / BINARIZED / "dict.en.txt"
    ).read_bytes()


def test_phrases_train_on_request(prepared, package, tmp_path):
    folder = tmp_path / "corpus"
    assert run("embedded", folder, "--package", package, *SMALL, "--train-on-phrases").returncode == 0
    train, phrases = lines(folder, "train.de"), lines(folder, "phrases.de")
    assert phrases == lines(prepared[0], "phrases.de")
    assert sorted(train) == sorted(lines(prepared[0], "train.de") + phrases)
    assert (folder / MODEL).read_bytes() == (prepared[0] / MODEL).read_bytes()


def test_what_is_held_out_is_not_in_training(prepared):
    folder, _ = prepared
    for language in ("de", "en"):
        texts = {
            name: {words(line) for line in lines(folder, f"{name}.{language}")}
            for name in ("train", "valid", "test")
        }
        assert not texts["train"] & texts["valid"]
        assert not texts["train"] & texts["test"]
        assert not texts["valid"] & texts["test"]


def test_the_binarized_text_is_the_raw_text(prepared):
    from fairseq.data import Dictionary, indexed_dataset

    folder, _ = prepared
    for language in ("de", "en"):
        pieces = Dictionary.load(str(folder / BINARIZED / f"dict.{language}.txt"))
        prefix = str(folder / BINARIZED / f"train.de-en.{language}")
        dataset = indexed_dataset.make_dataset(prefix, impl="mmap")
        texts = [pieces.string(dataset[i], bpe_symbol="sentencepiece") for i in range(len(dataset))]
        assert texts == lines(folder, f"train.{language}")


def test_the_table_and_the_statistics_count_every_pair(prepared):
    folder, output = prepared
    statistics = json.loads((folder / STATISTICS).read_text())
    rows = statistics["rules"]
    for before, after in zip(rows, rows[1:]):
        assert after["kept"] + after["dropped"] == before["kept"]
    for row in rows:
        assert [row["rule"], str(row["kept"]), str(row["dropped"])] in [
            [line[: len(row["rule"])], *line[len(row["rule"]) :].split()] for line in output.splitlines()
        ]
    assert statistics["pairs"] == {
        name: len(lines(folder, f"{name}.de")) for name in ("train", "valid", "test", "phrases")
    }
    assert set(statistics["pieces"]) == set(TEXTS)
    assert set(statistics["held-out sentences one word from a training sentence"]) == {"valid", "test"}


def test_run_again_it_does_only_what_is_missing(prepared, package, tmp_path):
    """The package is needed no more, a part that was lost is made again, and all stays the same."""
    before = contents(prepared[0])
    folder = tmp_path / "corpus"
    shutil.copytree(prepared[0], folder)
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    moved = package.rename(package.with_suffix(".moved"))
    try:
        assert "nothing to do" in run("embedded", folder, "--package", package, *SMALL).stdout
        assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == times
        shutil.rmtree(folder / BINARIZED)
        assert run("embedded", folder, "--package", package, *SMALL).returncode == 0
    finally:
        moved.rename(package)
    assert contents(folder) == before
    assert (folder / MODEL).stat().st_mtime_ns == times[folder / MODEL]


def test_killed_at_any_point_it_goes_on_to_the_same_corpus(prepared, package, tmp_path):
    folder = tmp_path / "corpus"
    partial = tmp_path / ".corpus.partial"
    arguments = ("embedded", folder, "--package", package, *SMALL)
    for milestone in (TEXTS[0], STATISTICS, MODEL, EMBEDDINGS[1]):
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (partial / milestone).exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not folder.exists()
    assert run(*arguments).returncode == 0
    assert contents(folder) == contents(prepared[0])
    assert list(tmp_path.iterdir()) == [folder]


def test_interrupted_it_says_how_to_go_on(package, tmp_path):
    process = subprocess.Popen(
        command("embedded", tmp_path / "corpus", "--package", package, *SMALL),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs, and what they start, ignore Ctrl-C unless told otherwise
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / ".corpus.partial" / MODEL).exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode != 0
    assert error.splitlines()[-1] == "interrupted: run the same command again to go on."
    assert "Traceback" not in error


def test_a_package_a_plain_and_a_gzipped_file_hold_the_same_dictionary(package, dictionary, tmp_path):
    zipped = tmp_path / "de-en.gz"
    zipped.write_bytes(gzip.compress(dictionary.read_bytes()))
    expected = dictionary_from(package)
    assert len(expected) == 20
    assert dictionary_from(zipped) == expected
    assert dictionary_from(dictionary) == expected


@pytest.mark.parametrize(
    ("name", "content", "telling"),
    [
        ("missing.deb", None, "cannot be read"),
        ("missing.gz", None, "cannot be read"),
        ("damaged.gz", gzip.compress(DICTIONARY.encode())[:-20], "truncated"),
        ("not-zipped.gz", DICTIONARY.encode(), "Not a gzipped file"),
        ("latin", DICTIONARY.encode("latin-1"), "not UTF-8"),
        ("prose", b"No dictionary at all.\n", "no dictionary"),
        ("text.deb", b"no package", "no Debian package"),
    ],
)
def test_a_file_that_is_no_dictionary_is_refused(name, content, telling, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert_refused(run("embedded", tmp_path / "corpus", "--package", file, *SMALL), file, telling)
    assert not (tmp_path / "corpus").exists()


def test_a_truncated_package_is_refused(package, tmp_path):
    file = tmp_path / "half.deb"
    file.write_bytes(package.read_bytes()[:-100])
    assert_refused(run("embedded", tmp_path / "corpus", "--package", file, *SMALL), file, "truncated")
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["--vocab-size", "10"], "--vocab-size 10: must be at least 100"),
        (["--held-out", "0"], "--held-out 0: must be at least 1"),
        (["--held-out", "15"], "--held-out 15"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--embed-dim", "0"], "--embed-dim 0: must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments, telling, dictionary, tmp_path):
    result = run("embedded", tmp_path / "corpus", "--package", dictionary, *SMALL, *arguments)
    assert_refused(result, telling)
    assert not (tmp_path / "corpus").exists()


def test_a_folder_that_cannot_be_written_is_refused(dictionary, tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "corpus"
    assert_refused(run("embedded", folder, "--package", dictionary, *SMALL), folder, "cannot be written")


def test_a_folder_with_something_else_is_left_alone(dictionary, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert_refused(run("embedded", tmp_path, "--package", dictionary, *SMALL), tmp_path, "name a new folder")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_corpus_of_other_settings_is_left_alone(prepared, package):
    before = contents(prepared[0])
    result = run("embedded", prepared[0], "--package", package, *SMALL, "--seed", "2")
    assert_refused(result, prepared[0], "seed 1, not 2")
    assert contents(prepared[0]) == before


@pytest.mark.skipif(INSTALLED.exists(), reason="the dictionary is installed here")
def test_without_the_dictionary_the_generated_corpus_stands_in_and_says_so(tmp_path):
    folder = tmp_path / "corpus"
    result = run("embedded", folder, *SMALL, PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    statistics = json.loads((folder / STATISTICS).read_text())
    note = "The generated corpus stands in for the dictionary, which can't be had (there is no apt-get here)."
    assert statistics["corpus"] == "generated"
    assert statistics["note"] == note
    assert result.stdout.splitlines()[-1] == note
    assert len(lines(folder, "train.de")) > 9000


def test_the_generated_corpus_comes_in_the_same_layout(tmp_path):
    arguments = ("--pairs", "300", "--held-out", "20", "--workers", "1")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        result = run("generated", folder, *arguments)
        assert result.returncode == 0, result.stderr
    assert {file.name for file in first.iterdir()} == PARTS
    assert [len(lines(first, f"{name}.de")) for name in ("train", "valid", "test")] == [260, 20, 20]
    assert contents(first) == contents(second)


@pytest.mark.parametrize("pairs", ["0", "1000000"])
def test_a_number_of_generated_pairs_out_of_range_is_refused(pairs, tmp_path):
    result = run("generated", tmp_path / "corpus", "--pairs", pairs)
    assert_refused(result, f"--pairs {pairs}: must be from 1 to 100000")
