"""A random part of a batch, for ``--ascent-fraction``."""

from __future__ import annotations

from numbers import Number
from typing import Any

import torch
from torch import Tensor

#: Logging outputs that are counts, not sums of losses.
COUNTS = ("ntokens", "nsentences", "sample_size")

# Fields with a column for each token or frame of the source or of the target, and fields with other columns.
SOURCE = {"src_tokens", "durations", "pitches", "energies"}
TARGET = {"target", "prev_output_tokens"}
NEITHER = {"speaker", "tgt_speaker"}


def random_part(sample: dict[str, Any], fraction: float, padding: int | None) -> dict[str, Any]:
    """Return a batch of some random sentences of *sample*, in their order.

    It is the batch that the dataset would have made of these sentences: padded to the longest of them, with
    its own ``ntokens``. Every tensor must have a row for each of the n sentences, and a list of length n
    counts as a list with an item for each, unless these are tensors with n rows. If the batch consists of
    batches, as in multilingual tasks, a part of each is drawn. fairseq seeds its generator with the number of
    the update. A copy of it draws here, so that the passes get the same random numbers as without a part.

    Args:
        sample: the batch.
        fraction: of the sentences; round(fraction n) are drawn, at least one.
        padding: index of the padding symbol, if there is one.

    Raises:
        SystemExit: the sentences of the batch cannot be told apart.
    """
    if "nsentences" not in sample:
        batches = {k: v for k, v in sample.items() if isinstance(v, dict) and "nsentences" in v}
        if not batches:
            raise _refusal(f"they have no 'nsentences', but {', '.join(map(repr, sample))}")
        return {**sample, **{k: random_part(batch, fraction, padding) for k, batch in batches.items()}}
    if "alignments" in sample:
        raise _refusal("their 'alignments' (--load-alignments) count the words of the whole batch")
    ids = sample.get("id")
    # The 'nsentences' of fairseq's denoising tasks is the length of a sentence.
    n = len(ids) if isinstance(ids, Tensor) else int(sample["nsentences"])
    count = max(1, round(fraction * n))
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    rows = torch.randperm(n, generator=generator)[:count].sort().values
    part = _rows_of(sample, n, rows)
    part["nsentences"] = count
    _fit_(part, sample, n, rows, padding)
    return part


def extrapolate_(part: dict[str, Any], whole: dict[str, Any], scale: float) -> None:
    """Extrapolate the logging outputs of *part* of a batch, in place: scale sums, take counts of *whole*."""
    for key, value in part.items():
        if key in COUNTS:
            part[key] = whole.get(key, value)
        elif isinstance(value, (Number, Tensor)) and not isinstance(value, bool):
            part[key] = part[key] * scale


def _rows_of(value: Any, n: int, rows: Tensor, name: str = "") -> Any:
    if isinstance(value, Tensor) and value.dim() > 0:
        if len(value) != n:
            shape = tuple(value.shape)
            raise _refusal(f"{name!r}, of shape {shape}, does not have a row for each of {n} sentences")
        return value[rows.to(value.device)]
    if isinstance(value, dict):
        return {k: _rows_of(v, n, rows, f"{name}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == n and not all(_has_rows(v, n) for v in value):
            parts = [value[row] for row in rows.tolist()]
        else:
            parts = [_rows_of(v, n, rows, f"{name}[{i}]") for i, v in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _has_rows(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == n


def _fit_(part: dict[str, Any], whole: dict[str, Any], n: int, rows: Tensor, padding: int | None) -> None:
    """Cut needless padding from *part*, *rows* of *whole*, and count its tokens, in place.

    Targets of further tasks that it may hold are treated alike.
    """
    for key, value in part.items():
        if isinstance(value, dict) and key != "net_input":
            _fit_(value, whole[key], n, rows, padding)
    inputs, target = whole.get("net_input", {}), whole.get("target")
    source_lengths, target_lengths = inputs.get("src_lengths"), whole.get("target_lengths")
    # Without a decoder, there is a target for each token of the source.
    has_decoder = isinstance(inputs.get("prev_output_tokens"), Tensor) or target_lengths is not None
    has_tokens = isinstance(target, Tensor) and target.dim() == 2 and padding is not None
    counted = (target != padding).sum(1) if has_tokens else None
    if target_lengths is None:
        target_lengths = counted
    if isinstance(source_lengths, Tensor):
        fields = SOURCE if has_decoder else SOURCE | TARGET
        _narrow_(part, whole, source_lengths, rows, fields, inputs.get("src_tokens"))
    if isinstance(target_lengths, Tensor) and has_decoder:
        _narrow_(part, whole, target_lengths, rows, TARGET, target)
    if "ntokens" in whole:
        part["ntokens"] = whole["ntokens"] * len(rows) / n
        for lengths in (target_lengths, counted, source_lengths):
            if isinstance(lengths, Tensor) and int(lengths.sum()) == whole["ntokens"]:
                part["ntokens"] = int(lengths[rows.to(lengths.device)].sum())
                break


def _narrow_(
    part: dict[str, Any],
    whole: dict[str, Any],
    lengths: Tensor,
    rows: Tensor,
    fields: set[str],
    padded: Any,
) -> None:
    """Cut *fields* of *part*, *rows* of *whole*, to the length of its longest row, in place.

    *padded* shows at which end the padding is. Nothing is cut unless all the fields are as wide in *whole* as
    its longest row, nor if an unknown field is just as wide: it might belong to them.
    """
    width, longest = int(lengths.max()), int(lengths[rows.to(lengths.device)].max())
    start = _start_of_longest(padded, lengths, longest)
    if longest == width or start is None:
        return
    cut = []
    for place, contents in ((part, whole), (part.get("net_input", {}), whole.get("net_input", {}))):
        for key, value in contents.items():
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(tensor, Tensor) or tensor.dim() < 2:
                    continue
                if key in fields and tensor is value and tensor.size(1) == width:
                    cut.append((place, key))
                elif key in fields or (tensor.size(1) == width and key not in SOURCE | TARGET | NEITHER):
                    return
    for place, key in cut:
        place[key] = place[key].narrow(1, start, longest).contiguous()


def _start_of_longest(padded: Any, lengths: Tensor, longest: int) -> int | None:
    """Return the first column of *padded* that rows of length *longest* need; ``None`` if it is unclear."""
    if not isinstance(padded, Tensor) or padded.dim() < 2:
        return None
    if padded.dim() > 2 or padded.is_floating_point():  # speech
        return 0
    width, shortest = padded.size(1), int(lengths.argmin())
    padding = torch.arange(width, device=lengths.device) >= lengths[:, None]
    if torch.equal(padded == padded[shortest, -1], padding):
        return 0
    if torch.equal(padded == padded[shortest, 0], padding.flip(1)):
        return width - longest
    return None


def _refusal(reason: str) -> SystemExit:
    return SystemExit(
        f"fairseq_asam: --ascent-fraction cannot take a part of this task's batches: {reason}; "
        "use --ascent-fraction 1"
    )
