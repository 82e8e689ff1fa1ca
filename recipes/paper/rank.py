"""How well measures of sharpness rank models by their generalization gap (Table 1 and Figure 2 of the paper).

The models are those of a grid, all trained to the same stopping criterion::

    [{"hyper_parameters": {"learning rate": 0.1, "dropout rate": 0.5}, "generalization_gap": 0.31,
      "measures": {"sharpness (p = 2)": 0.02, "adaptive sharpness (p = 2)": 0.4}}, ...]
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from scipy.stats import kendalltau

from fairseq_asam.files import write_json
from recipes.reporter import format_number, markdown_table, write_figure, write_text


def kendall(gaps: Sequence[float], values: Sequence[float]) -> float:
    """Return Kendall's rank correlation (tau-b), or 0 if all *gaps* or all *values* are equal."""
    tau = float(kendalltau(gaps, values)[0])
    return 0.0 if math.isnan(tau) else tau


def granulated(models: list[dict[str, Any]], measure: str, hyper_parameter: str) -> float | None:
    """Return the granulated coefficient psi of Jiang et al. (2019).

    It is the mean of Kendall's tau over the sets of models that differ in *hyper_parameter* alone, or
    ``None`` if no set has two models.
    """
    sets = defaultdict(list)
    for model in models:
        others = {k: v for k, v in model["hyper_parameters"].items() if k != hyper_parameter}
        sets[json.dumps(others, sort_keys=True)].append(model)
    taus = [_tau(alike, measure) for alike in sets.values() if len(alike) > 1]
    return float(np.mean(taus)) if taus else None


def rank_statistics(models: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the coefficients of each measure.

    Returns:
        For each measure, ``tau`` over all *models*, ``granulated`` with the coefficient of each
        hyper-parameter, and their mean Psi as ``average``.

    Raises:
        ValueError: A number is not finite.
    """
    for number, model in enumerate(models):
        for value in (model["generalization_gap"], *model["measures"].values()):
            if not math.isfinite(value):
                raise ValueError(f"model {number} of the list has the value {value}, which cannot be ranked")
    statistics = {}
    for measure in models[0]["measures"]:
        by_parameter = {name: granulated(models, measure, name) for name in models[0]["hyper_parameters"]}
        known = [psi for psi in by_parameter.values() if psi is not None]
        statistics[measure] = {
            "tau": _tau(models, measure),
            "granulated": by_parameter,
            "average": float(np.mean(known)) if known else None,
        }
    return statistics


def table(statistics: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table like Table 1."""
    of_each = list(statistics.values())
    rows = {
        "τ (rank corr.)": [each["tau"] for each in of_each],
        **{name: [each["granulated"][name] for each in of_each] for name in of_each[0]["granulated"]},
        "Ψ (avg.)": [each["average"] for each in of_each],
    }
    return markdown_table(
        ["", *statistics],
        [[name, *(format_number(v, digits=3) for v in values)] for name, values in rows.items()],
    )


def draw(models: list[dict[str, Any]], statistics: dict[str, dict[str, Any]]) -> plt.Figure:
    """Draw each measure against the generalization gap."""
    columns = min(2, len(statistics))
    rows = math.ceil(len(statistics) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(5 * columns, 3.8 * rows), layout="constrained", squeeze=False, sharey=True
    )
    gaps = [model["generalization_gap"] for model in models]
    for panel, (measure, each) in zip(panels.flat, statistics.items()):
        panel.scatter([model["measures"][measure] for model in models], gaps, s=14, alpha=0.7)
        panel.set(title=f"{measure}, $\\tau$ = {each['tau']:.3f}", xlabel=measure)
    for panel in panels[:, 0]:
        panel.set_ylabel("generalization gap")
    for panel in panels.flat[len(statistics) :]:
        panel.remove()
    return figure


def write(out: Path, models: list[dict[str, Any]], statistics: dict[str, dict[str, Any]], text: str) -> None:
    """Write rank.json, rank.png and, with *text*, rank.md to the folder *out*."""
    write_json(out / "rank.json", {"models": len(models), "statistics": statistics})
    write_text(out / "rank.md", text)
    write_figure(out / "rank.png", draw(models, statistics))


def _tau(models: list[dict[str, Any]], measure: str) -> float:
    return kendall(
        [model["generalization_gap"] for model in models], [model["measures"][measure] for model in models]
    )
