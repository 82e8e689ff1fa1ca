"""Files, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside *path*; what was written there becomes *path* if the block succeeds, and
    is deleted if it does not. Folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write *value*, all of whose numbers must be finite, to *path*."""
    with whole(path) as file:
        file.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", "utf-8")
