"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import threading

import pytest

from fairseq_asam.files import whole, write_json


def test_what_breaks_off_leaves_what_was_there(tmp_path):
    file = tmp_path / "new" / "file"
    write_json(file, 1)
    with pytest.raises(KeyboardInterrupt), whole(file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(file.read_text()) == 1 and os.listdir(file.parent) == ["file"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "disk" / "file").read_text()) == 1


def test_what_is_no_file_is_written_to_itself(tmp_path):
    """As /dev/stdout."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(pipe, 1)
    reader.join()
    assert read == ["1\n"] and os.listdir(tmp_path) == ["pipe"]
