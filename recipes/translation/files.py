"""Text files: read by lines, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file without their ends; only a newline ends a line."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there becomes `path` if the block succeeds."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
