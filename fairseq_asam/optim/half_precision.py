"""The model's weights and their float32 masters, which ``--fp16`` and bfloat16 step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from fairseq.optim import FairseqOptimizer, FP16Optimizer
from torch import Tensor


def model_parameters(optimizer: FairseqOptimizer) -> list[Tensor]:
    """Return the model's parameters that *optimizer* trains; with half precision, these are no masters."""
    return optimizer.fp16_params if isinstance(optimizer, FP16Optimizer) else list(optimizer.params)


def master_weights(optimizer: FairseqOptimizer) -> dict[Tensor, Tensor]:
    """Return the float32 master of each half-precision parameter; none in full precision."""
    if not isinstance(optimizer, FP16Optimizer):
        return {}
    masters = [master.detach() for master in optimizer.fp32_optimizer.params]
    return dict(zip(optimizer.fp16_params, as_model_parameters(optimizer, masters)))


def of_model_parameters(
    moments: Callable[[torch.optim.Optimizer], Mapping[Tensor, Tensor]], optimizer: FairseqOptimizer
) -> Mapping[Tensor, Tensor]:
    """Return what *moments* returns, with the model's parameters for those that torch's optimizer steps.

    Args:
        moments: a function of :mod:`fairseq_asam.sharpness.moments`.
        optimizer: the Trainer's.
    """
    stepped = moments(getattr(optimizer, "fp32_optimizer", optimizer).optimizer)
    if not isinstance(optimizer, FP16Optimizer) or not stepped:
        return stepped
    if optimizer.has_flat_params:
        return dict(zip(optimizer.fp16_params, as_model_parameters(optimizer, list(stepped.values()))))
    pairs = zip(optimizer.fp16_params, optimizer.fp32_optimizer.params)
    return {parameter: stepped[master] for parameter, master in pairs if master in stepped}


def as_model_parameters(optimizer: FairseqOptimizer, tensors: list[Tensor]) -> list[Tensor]:
    """Return views of *tensors*, one per parameter of the model and in its shape.

    *tensors* has one per parameter that the base optimizer steps. ``--fp16`` makes one flat buffer of these.
    """
    if not isinstance(optimizer, FP16Optimizer) or not optimizer.has_flat_params:
        return tensors
    (flat,) = tensors
    parts = flat.split([p.numel() for p in optimizer.fp16_params])
    return [part.view_as(p) for part, p in zip(parts, optimizer.fp16_params)]
