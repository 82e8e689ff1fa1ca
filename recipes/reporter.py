"""Tables and pictures of results, written whole or not at all."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from fairseq_asam.files import whole

matplotlib.rcParams.update(
    {
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample standard deviation of *values*; ``None`` where there are too few."""
    return (
        statistics.mean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def format_number(mean: float | None, sd: float | None = None, digits: int = 2) -> str:
    """Return ``mean ± sd`` with *digits* decimals; a mean that is ``None`` makes an empty text."""
    if mean is None:
        return ""
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. The first column is aligned left, the others right."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    lines = [head.replace("|  |", "| |"), f"|:--|{'--:|' * (len(header) - 1)}", *body]
    return "\n".join(lines) + "\n"


def table_of(rows: Iterable[Mapping[str, Any]], *columns: tuple[str, str]) -> str:
    """Return a Markdown table of *rows*. A column is its header and the format string of its cells."""
    header = [name for name, _ in columns]
    return markdown_table(header, [[cell.format(**row) for _, cell in columns] for row in rows])


def best_rho(scores: dict[float, float | None]) -> float:
    """Return the rho of the highest of *scores* at the two decimals that tables show; of equals, the smaller.

    Args:
        scores: The score of each rho. ``None`` stands for a rho whose runs all failed.

    Raises:
        ValueError: There is no score at all.
    """
    rounded = {rho: round(score, 2) for rho, score in scores.items() if score is not None}
    if not rounded:
        raise ValueError(f"none of the values of rho {', '.join(map(str, scores))} has a score")
    return max(rounded, key=lambda rho: (rounded[rho], -rho))


def write_text(path: Path, text: str) -> None:
    """Write *text* to *path* in UTF-8."""
    with whole(path) as file:
        file.write_text(text, "utf-8")


def write_figure(path: Path, figure: Figure) -> None:
    """Write *figure* to *path* as PNG."""
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=150)
