"""A random part of a batch, for ``--ascent-fraction``."""

from __future__ import annotations

from numbers import Number
from typing import Any

import torch
from torch import Tensor

#: What logging outputs count, rather than sum over sentences.
COUNTS = ("ntokens", "nsentences", "sample_size")


def random_part(sample: dict[str, Any], fraction: float, padding: int | None) -> dict[str, Any]:
    """Return a batch of round(*fraction* n) of the n sentences of *sample*, at least one, in their order.

    They are drawn with torch's generator, which fairseq seeds with the number of the update. Tensors whose
    first dimension is n are taken to hold a row for each sentence. ``ntokens`` is counted again, in the
    target without *padding* or else, where there is no such tensor, in proportion. A batch that consists of
    batches, as those of multilingual tasks do, gets a part of each.

    Raises:
        RuntimeError: the target is a tensor of another form, so that sentences cannot be told apart.
    """
    if "nsentences" not in sample:
        return {k: random_part(v, fraction, padding) if isinstance(v, dict) else v for k, v in sample.items()}
    n = int(sample["nsentences"])
    count = max(1, round(fraction * n))
    rows = torch.randperm(n)[:count].sort().values
    part = _rows_of(sample, n, rows)
    part["nsentences"] = count
    target = part.get("target")
    if isinstance(target, Tensor) and len(target) != count:
        raise RuntimeError(
            f"--ascent-fraction cannot take a part of this task's batches: a target of shape "
            f"{tuple(target.shape)} does not have a row for each of {n} sentences; use --ascent-fraction 1"
        )
    if "ntokens" in sample:
        counted = isinstance(target, Tensor) and padding is not None
        part["ntokens"] = int((target != padding).sum()) if counted else sample["ntokens"] * count / n
    return part


def extrapolate_(part: dict[str, Any], whole: dict[str, Any], scale: float) -> None:
    """Scale the sums in *part*, the logging outputs of a part of a batch, in place to what is expected of the
    whole batch, whose counts are taken from *whole*."""
    for key, value in part.items():
        if key in COUNTS:
            part[key] = whole.get(key, value)
        elif isinstance(value, (Number, Tensor)) and not isinstance(value, bool):
            part[key] = value * scale


def _rows_of(value: Any, n: int, rows: Tensor) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == n:
        return value[rows.to(value.device)]
    if isinstance(value, dict):
        return {k: _rows_of(v, n, rows) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows_of(v, n, rows) for v in value)
    return value
