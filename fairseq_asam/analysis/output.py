"""Pictures, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from fairseq_asam.files import whole


def write_figure(path: Path, figure: Figure) -> None:
    """Write *figure* to *path* as PNG."""
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=150)
