"""JSON and pictures, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from fairseq_asam.files import whole


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write *value*, all of whose numbers must be finite, to *path*."""
    with whole(path) as file:
        file.write_text(json.dumps(value, indent=indent, allow_nan=False) + "\n", "utf-8")


def write_figure(path: Path, figure: Figure) -> None:
    """Write *figure* to *path* as PNG."""
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=150)
