"""Writes files whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside *path*. What the block writes there becomes *path* if it succeeds.

    If the block raises, the temporary file is deleted. Missing folders are made. A link stays one. What is
    no file, such as /dev/stdout, is written to itself.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write *value* to *path*. All numbers in it must be finite."""
    with whole(path) as file:
        file.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", "utf-8")
