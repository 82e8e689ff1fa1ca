"""The preparation of IWSLT'14, from an archive of its layout made of the generated corpus."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from data_prep import generated, moses
from data_prep.archive import URL
from tests.data_prep import commands
from tests.data_prep.commands import assert_refused, lines
from tests.iwslt14_archive import (
    TEST_FILES,
    TEST_SENTENCES,
    TRAINING_SENTENCES,
    archived,
    contents,
)

SPLITS = ("train", "valid", "test")


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    return commands.run("iwslt14", *arguments, "--workers", "2", **variables)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return archived(tmp_path_factory.mktemp("archive") / "de-en.tgz", contents())


@pytest.fixture(scope="module")
def prepared(archive, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    result = run(folder, "--archive", archive)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_folder_is_whole_and_nothing_lies_beside_it(prepared):
    folder, _ = prepared
    texts = {f"{name}.{language}" for name in SPLITS for language in ("de", "en")}
    assert {file.name for file in folder.iterdir()} == {*texts, "bpe.codes", "bin", "statistics.json"}
    assert list(folder.parent.iterdir()) == [folder]


def test_every_23rd_clean_pair_is_for_validation(prepared):
    folder, _ = prepared
    kept = (
        TRAINING_SENTENCES + 2 * TRAINING_SENTENCES // 100 + 3
    )  # titles, descriptions; 2:3, 175, rare words
    for language in ("de", "en"):
        train, valid = lines(folder, f"train.{language}"), lines(folder, f"valid.{language}")
        assert len(valid) == kept // 23
        assert len(train) == kept - kept // 23
    pairs = generated.pairs(23, seed=1)  # the first talk has two lines before its first sentence
    assert lines(folder, "valid.de")[0] == moses.tokenize(pairs[20].source, "de").lower()
    assert lines(folder, "valid.en")[0] == moses.tokenize(pairs[20].target, "en").lower()
    assert lines(folder, "train.de")[22] == moses.tokenize(pairs[21].source, "de").lower()


def test_tags_go_and_what_stands_in_titles_and_descriptions_stays(prepared):
    folder, _ = prepared
    title, description = lines(folder, "train.en")[:2]
    assert title == "talk 0 : it &apos;s a &quot; title &quot;"
    assert lines(folder, "train.de")[0] == "talk 0 : it &apos; s a &quot; title &quot;"
    assert description == "ted talk subtitles : &#91; music &#93; &amp; more ."
    text = "\n".join(lines(folder, "train.en") + lines(folder, "valid.en"))
    for word in ("example", "science", "somebody", "nobody", "&lt;"):
        assert word not in text


def test_pairs_too_long_or_too_uneven_are_left_out(prepared):
    folder, _ = prepared
    german = lines(folder, "train.de") + lines(folder, "valid.de")
    assert "lang lang" in german
    assert "kurz" not in german
    assert "" not in german
    assert max(len(line.split()) for line in german) == 175


def test_the_test_sets_follow_one_another_in_the_documented_order(prepared):
    folder, _ = prepared
    english, german = lines(folder, "test.en"), lines(folder, "test.de")
    assert len(english) == len(german) == len(TEST_FILES) * TEST_SENTENCES
    for i in range(len(TEST_FILES)):
        assert english[i * TEST_SENTENCES] == f"test set {i} : it &apos;s &amp; amp ; isn &apos;t so ."
        assert german[i * TEST_SENTENCES] == f"test set {i} : it &apos; s &amp; amp ; isn &apos; t so ."
    pairs = generated.pairs(TRAINING_SENTENCES + 2, seed=1)
    assert english[1] == moses.tokenize(pairs[-1].target, "en").lower()


def test_the_binarized_text_is_the_text_in_pieces_and_each_language_has_its_dictionary(prepared):
    from fairseq.data import Dictionary, indexed_dataset

    folder, _ = prepared
    assert lines(folder, "bpe.codes")[0] == "#version: 0.2"
    dictionaries = [(folder / "bin" / f"dict.{language}.txt").read_text() for language in ("de", "en")]
    assert dictionaries[0] != dictionaries[1]
    for language in ("de", "en"):
        pieces = Dictionary.load(str(folder / "bin" / f"dict.{language}.txt"))
        for name in ("train", "test"):
            prefix = str(folder / "bin" / f"{name}.de-en.{language}")
            dataset = indexed_dataset.make_dataset(prefix, impl="mmap")
            texts = [pieces.string(dataset[i]) for i in range(len(dataset))]
            if name == "train":
                assert [text.replace("@@ ", "") for text in texts] == lines(folder, f"{name}.{language}")
                assert any("@@ " in text for text in texts)
            else:
                assert len(texts) == len(lines(folder, f"{name}.{language}"))


def test_the_statistics_tell_the_archive_and_that_the_counts_are_not_the_published_ones(prepared, archive):
    folder, result = prepared
    statistics = json.loads((folder / "statistics.json").read_text())
    assert statistics["archive"] == {
        "bytes": archive.stat().st_size,
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
    }
    assert statistics["pairs"] == {name: len(lines(folder, f"{name}.de")) for name in SPLITS}
    assert statistics["published pairs"] == {"train": 160239, "valid": 7283, "test": 6750}
    (warning,) = result.stderr.splitlines()
    assert warning == f"warning: {statistics['warning']}"
    assert "train: 160239, valid: 7283, test: 6750" in warning


def test_run_again_there_is_nothing_to_do_and_a_lost_part_is_made_again(prepared, archive):
    folder, _ = prepared
    assert "nothing to do" in run(folder, "--archive", archive).stdout
    before = (folder / "bpe.codes").read_bytes()
    (folder / "bpe.codes").unlink()
    assert run(folder, "--archive", archive).returncode == 0
    assert (folder / "bpe.codes").read_bytes() == before


def altered(change: str, folder: Path) -> Path:
    """An archive that isn't right."""
    files, file = contents(), folder / "de-en.tgz"
    special = []
    if change == "of the folder itself":
        member = tarfile.TarInfo(".")
        member.type = tarfile.DIRTYPE
        special.append(member)
        del files["de-en/IWSLT14.TEDX.dev2012.de-en.en.xml"]
    if change in ("link", "hard link", "device"):
        member = tarfile.TarInfo("de-en/extra")
        member.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}[
            change
        ]
        member.linkname = "/etc/passwd"
        special.append(member)
    elif change == "path upwards":
        files["de-en/../../escaped"] = b"gone"
    elif change == "absolute path":
        files["/tmp/escaped"] = b"gone"
    elif change == "missing file":
        del files["de-en/IWSLT14.TEDX.dev2012.de-en.en.xml"]
    elif change == "other pair":
        files = {name.replace("de-en", "fr-en"): content for name, content in files.items()}
    elif change == "uneven":
        files["de-en/train.tags.de-en.en"] += b"One more.\n"
    elif change == "uneven test set":
        files["de-en/IWSLT14.TED.tst2011.de-en.en.xml"] += b'<seg id="7"> One more. </seg>\n'
    elif change == "latin-1":
        files["de-en/train.tags.de-en.de"] = files["de-en/train.tags.de-en.de"].decode().encode("latin-1")
    elif change == "empty":
        files["de-en/train.tags.de-en.de"] = files["de-en/train.tags.de-en.en"] = b""
    archived(file, files, *special)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif change == "truncated by a byte":
        file.write_bytes(file.read_bytes()[:-1])
    elif change == "truncated member":
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:2000]))
    elif change == "not zipped":
        file.write_bytes(gzip.decompress(file.read_bytes()))
    elif change == "no tar":
        file.write_bytes(gzip.compress(b"prose " * 500))
    elif change == "nothing":
        file.write_bytes(b"")
    return file


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ("link", "'de-en/extra' in it is a link"),
        ("hard link", "'de-en/extra' in it is a link"),
        ("device", "or a device"),
        ("path upwards", "'de-en/../../escaped' in it leaves its folder"),
        ("absolute path", "'/tmp/escaped' in it leaves its folder"),
        ("missing file", "lacks de-en/IWSLT14.TEDX.dev2012.de-en.en.xml"),
        ("of the folder itself", "lacks de-en/IWSLT14.TEDX.dev2012.de-en.en.xml"),
        ("other pair", "holds the language pair fr-en, not de-en"),
        ("uneven", "train.tags.de-en in the archive has 516 German lines and 517"),
        ("uneven test set", "IWSLT14.TED.tst2011.de-en in the archive has 6 German lines and 7 English ones"),
        ("latin-1", "train.tags.de-en.de in the archive is not UTF-8"),
        ("empty", "0 clean pairs"),
        ("truncated", "damaged or truncated"),
        ("truncated by a byte", "damaged or truncated"),
        ("truncated member", "damaged or truncated"),
        ("not zipped", "no .tgz archive"),
        ("no tar", "no .tgz archive"),
        ("nothing", "no .tgz archive"),
    ],
)
def test_an_archive_that_is_not_right_is_refused(change, telling, tmp_path):
    file = altered(change, tmp_path)
    assert_refused(run(tmp_path / "corpus", "--archive", file), telling)
    assert list(tmp_path.iterdir()) == [file]
    assert not (tmp_path.parent / "escaped").exists()


def test_an_archive_that_is_not_there_is_refused(tmp_path):
    assert_refused(
        run(tmp_path / "corpus", "--archive", tmp_path / "none.tgz"), tmp_path / "none.tgz", "--archive"
    )
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_left_alone(archive, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert_refused(run(tmp_path, "--archive", archive), tmp_path, "name a new folder")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_corpus_of_another_archive_is_left_alone(prepared):
    assert_refused(run(prepared[0], "--archive", "other.tgz"), prepared[0], "not other.tgz")


def test_a_corpus_of_what_the_archive_held_before_is_left_alone(prepared, archive):
    content = archive.read_bytes()
    archive.write_bytes(archived(archive.with_name("other.tgz"), {}).read_bytes())
    try:
        assert_refused(run(prepared[0], "--archive", archive), f"was prepared from another {archive}")
    finally:
        archive.write_bytes(content)


def test_without_a_network_the_sentence_says_how_to_go_on(tmp_path):
    result = run(tmp_path / "corpus", http_proxy="http://127.0.0.1:9", no_proxy="")
    assert_refused(result, URL, "Connection refused", "--archive")
    assert not (tmp_path / "corpus").exists()
