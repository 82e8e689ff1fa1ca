"""Tables and pictures of results, written whole or not at all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from fairseq_asam.files import whole


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean of *values*, and their sample standard deviation; ``None`` of too few."""
    return (
        statistics.mean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def shown(mean: float | None, sd: float | None = None, digits: int = 2) -> str:
    """Return ``mean ± sd`` with so many *digits* after the point; nothing of ``None``."""
    if mean is None:
        return ""
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. The first column is aligned left, the others right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_text(path: Path, text: str) -> None:
    """Write *text* to *path* in UTF-8."""
    with whole(path) as file:
        file.write_text(text, "utf-8")


def write_figure(path: Path, figure: Figure) -> None:
    """Write *figure* to *path* as PNG."""
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=150)
