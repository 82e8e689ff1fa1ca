"""The preparation of IWSLT'14, from an archive of its layout made of the generated corpus."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import PreparationError, generated, moses
from data_prep.archive import URL, fetch
from tests.commands import ROOT
from tests.iwslt14_archive import (
    TEST_FILES,
    TEST_SENTENCES,
    TRAINING_SENTENCES,
    archived,
    contents,
)

SPLITS = ("train", "valid", "test")


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "data_prep.iwslt14", *map(str, arguments), "--workers", "2"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def lines(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text(encoding="utf-8").splitlines()


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
    assert lines(folder, "valid.de")[0] == moses.tokenize(pairs[20].german, "de").lower()
    assert lines(folder, "valid.en")[0] == moses.tokenize(pairs[20].english, "en").lower()
    assert lines(folder, "train.de")[22] == moses.tokenize(pairs[21].german, "de").lower()


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
    assert english[1] == moses.tokenize(pairs[-1].english, "en").lower()


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
    refused(run(tmp_path / "corpus", "--archive", file), telling)
    assert list(tmp_path.iterdir()) == [file]
    assert not (tmp_path.parent / "escaped").exists()


def refused(result: subprocess.CompletedProcess, *telling: object) -> None:
    assert result.returncode != 0
    (sentence,) = result.stderr.strip().splitlines()
    for part in telling:
        assert str(part) in sentence


def test_an_archive_that_is_not_there_is_refused(tmp_path):
    refused(run(tmp_path / "corpus", "--archive", tmp_path / "none.tgz"), tmp_path / "none.tgz", "--archive")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_left_alone(archive, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(run(tmp_path, "--archive", archive), tmp_path, "name a new folder")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_corpus_of_another_archive_is_left_alone(prepared):
    refused(run(prepared[0], "--archive", "other.tgz"), prepared[0], "not other.tgz")


def test_without_a_network_the_sentence_says_how_to_go_on(tmp_path):
    result = run(tmp_path / "corpus", http_proxy="http://127.0.0.1:9", no_proxy="")
    refused(result, URL, "Connection refused", "--archive")
    assert not (tmp_path / "corpus").exists()


CONTENT = bytes(range(256)) * 2000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, or a part of it; the path /ID/N breaks each answer off after N bytes."""

    ranges: list[str | None] = []  # noqa: RUF012
    knows_ranges = True

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.ranges.append(wanted)
        start = int(wanted[len("bytes=") : -1]) if wanted and self.knows_ranges else 0
        if self.path == "/none":
            self.send_error(404)
            return
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        most = int(self.path.rpartition("/")[2] or len(CONTENT))
        self.wfile.write(CONTENT[start : start + most])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {"ranges": []})
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_address[1]}", handler
    serving.shutdown()
    serving.server_close()


def test_a_download_goes_on_where_it_was_cut_off(server, tmp_path):
    url, handler = server
    file = tmp_path / "de-en.tgz"
    for _ in range(2):
        with pytest.raises(PreparationError, match=r"cut off after .* of 512000 bytes.*--archive"):
            fetch(f"{url}/200000", file)
        assert not file.exists()
    fetch(f"{url}/", file)
    assert file.read_bytes() == CONTENT
    assert handler.ranges == [None, "bytes=200000-", "bytes=400000-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["de-en.tgz", "de-en.tgz.json"]
    fetch(f"{url}/", file)
    assert len(handler.ranges) == 3


def test_a_server_that_knows_no_ranges_sends_all_again(server, tmp_path):
    url, handler = server
    handler.knows_ranges = False
    (tmp_path / "de-en.tgz.partial").write_bytes(CONTENT[:1000])
    fetch(f"{url}/", tmp_path / "de-en.tgz")
    assert (tmp_path / "de-en.tgz").read_bytes() == CONTENT


def test_a_download_killed_at_its_very_end_is_whole(server, tmp_path):
    (tmp_path / "de-en.tgz.partial").write_bytes(CONTENT)
    fetch(f"{server[0]}/", tmp_path / "de-en.tgz")
    assert (tmp_path / "de-en.tgz").read_bytes() == CONTENT


def test_a_partial_download_that_is_too_long_is_thrown_away(server, tmp_path):
    (tmp_path / "de-en.tgz.partial").write_bytes(CONTENT + b"more")
    with pytest.raises(PreparationError, match="run the same command again"):
        fetch(f"{server[0]}/", tmp_path / "de-en.tgz")
    fetch(f"{server[0]}/", tmp_path / "de-en.tgz")
    assert (tmp_path / "de-en.tgz").read_bytes() == CONTENT


def test_an_archive_that_changed_since_first_sight_is_refused(server, tmp_path):
    file = tmp_path / "de-en.tgz"
    fetch(f"{server[0]}/", file)
    record = json.loads((tmp_path / "de-en.tgz.json").read_text())
    assert record == {"bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    file.write_bytes(CONTENT[::-1])
    with pytest.raises(PreparationError, match="isn't what it was at first sight"):
        fetch(f"{server[0]}/", file)


def test_a_file_that_the_server_lacks_is_one_sentence(server, tmp_path):
    with pytest.raises(PreparationError, match=r"Not Found.*--archive"):
        fetch(f"{server[0]}/none", tmp_path / "de-en.tgz")


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "He said: 'No.'", "He said : &apos; No . &apos;"),
        ("en", "In 1990's, it's 5,300...", "In 1990 &apos;s , it &apos;s 5,300 ..."),
        ("de", "Dr. Meier wohnt z.B. im 3. Stock.", "Dr. Meier wohnt z.B. im 3. Stock ."),
        ("de", "Dr. Meier kam um 5.", "Dr. Meier kam um 5 ."),
        ("en", "So am I.", "So am I ."),
        ("en", "And so on...", "And so on ..."),
        ("en", "...", "..."),
        ("de", "Ost-West [a|b] <c> & d", "Ost-West &#91; a &#124; b &#93; &lt; c &gt; &amp; d"),
    ],
)
def test_tokens_are_those_of_moses(language, text, expected):
    assert moses.tokenize(text, language) == expected


def test_lower_case_is_letter_by_letter():
    assert moses.lowercase("ΟΔΟΣ ÄÖ &amp;") == "οδοσ äö &amp;"


@pytest.mark.parametrize(
    ("german", "english", "clean"),
    [
        ("a b c", "a b", True),
        ("a b c d", "a b", False),
        ("a", "", False),
        ("", "", False),
        ("a", "b" * 1001, False),
    ],
)
def test_clean_pairs(german, english, clean):
    assert moses.is_clean(german, english) is clean
    assert moses.is_clean(english, german) is clean
