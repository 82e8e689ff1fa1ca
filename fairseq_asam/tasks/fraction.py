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
    first dimension is n, and lists of n, are taken to hold a row for each sentence. The source of a
    translation is cut to the longest that was drawn. ``ntokens`` is counted again, in the target without
    *padding* or else, where there is no such tensor, in proportion. A batch that consists of batches, as
    those of multilingual tasks do, gets a part of each.

    Raises:
        RuntimeError: the batch is of a form in which sentences cannot be told apart.
    """
    if "nsentences" not in sample:
        batches = {k: v for k, v in sample.items() if isinstance(v, dict) and "nsentences" in v}
        if not batches:
            raise _refusal(f"they have no 'nsentences', but {', '.join(map(repr, sample))}")
        return {**sample, **{k: random_part(batch, fraction, padding) for k, batch in batches.items()}}
    if "alignments" in sample:
        raise _refusal("their 'alignments' (--load-alignments) count the words of the whole batch")
    n = int(sample["nsentences"])
    count = max(1, round(fraction * n))
    rows = torch.randperm(n)[:count].sort().values
    part = _rows_of(sample, n, rows)
    part["nsentences"] = count
    target = part.get("target")
    if isinstance(target, Tensor) and len(target) != count:
        raise _refusal(
            f"a target of shape {tuple(target.shape)} does not have a row for each of {n} sentences"
        )
    if "prev_output_tokens" in part.get("net_input", {}):
        _cut_source(part["net_input"], sample["net_input"], padding)
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
    if _has_rows(value, n):
        return value[rows.to(value.device)]
    if isinstance(value, dict):
        return {k: _rows_of(v, n, rows) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == n and not any(_has_rows(v, n) for v in value):
            parts = [value[row] for row in rows.tolist()]
        else:
            parts = [_rows_of(v, n, rows) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _has_rows(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == n


def _cut_source(part: dict[str, Any], whole: dict[str, Any], padding: int | None) -> None:
    """Cut the source in *part* in place to its longest sentence, if that in *whole* ends with it as well:
    LSTMs and models of speech rely on it."""
    tokens, lengths = (part.get(key) for key in ("src_tokens", "src_lengths"))
    if not (isinstance(tokens, Tensor) and isinstance(lengths, Tensor)):
        return
    if tokens.dim() == 2 and padding is None:  # there is no telling which end has it
        return
    width, longest = tokens.size(1), int(lengths.max())
    if longest < width == int(whole["src_lengths"].max()):
        on_the_left = tokens.dim() == 2 and bool((tokens[:, 0] == padding).all())
        part["src_tokens"] = tokens[:, width - longest :] if on_the_left else tokens[:, :longest]


def _refusal(reason: str) -> RuntimeError:
    return RuntimeError(
        f"--ascent-fraction cannot take a part of this task's batches: {reason}; use --ascent-fraction 1"
    )
