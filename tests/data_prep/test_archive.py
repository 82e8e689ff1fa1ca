"""The download of IWSLT'14's archive."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from data_prep import PreparationError
from data_prep.archive import extract, fetch

CONTENT = (b"\x1f\x8b" + bytes(range(256)) * 2000)[:512000]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, or a part of it; the path /ID/N breaks each answer off after N bytes."""

    ranges: list[str | None] = []  # noqa: RUF012
    knows_ranges = knows_length = True
    page = b""

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
        if self.knows_length:
            self.send_header("Content-Length", str(len(self.page or CONTENT) - start))
        self.end_headers()
        if self.page:
            self.wfile.write(self.page)
            return
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


def test_a_server_that_does_not_say_how_much_it_sends(server, tmp_path):
    url, handler = server
    handler.knows_length = False
    fetch(f"{url}/", tmp_path / "de-en.tgz")
    assert (tmp_path / "de-en.tgz").read_bytes() == CONTENT


def test_the_page_of_a_login_is_not_kept(server, tmp_path):
    url, handler = server
    handler.page = b"<html>Please log in.</html>"
    with pytest.raises(PreparationError, match=r"what came is no .tgz archive, .* page of a login"):
        fetch(f"{url}/", tmp_path / "de-en.tgz")
    assert not list(tmp_path.iterdir())
    handler.page = b""
    fetch(f"{url}/", tmp_path / "de-en.tgz")
    assert (tmp_path / "de-en.tgz").read_bytes() == CONTENT


def test_a_damaged_archive_that_was_downloaded_says_what_to_remove(server, tmp_path):
    file = tmp_path / "de-en.tgz"
    fetch(f"{server[0]}/", file)
    with pytest.raises(PreparationError, match=f"remove it and {file}.json, to download it again"):
        extract(file, ["train.tags.de-en.de"], "de-en", tmp_path)


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
