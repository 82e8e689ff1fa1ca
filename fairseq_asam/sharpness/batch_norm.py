"""Batch normalization between the two passes of an update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def frozen_batch_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of *model*'s batch normalization layers as they are.

    A layer in training mode normalizes with the statistics of its batch, as ever, and one in evaluation
    mode with the running ones; ``running_mean``, ``running_var`` and ``num_batches_tracked`` are left
    alone. Around the pass at w + epsilon, evaluation then uses statistics taken at w, the weights that it
    evaluates. May be nested, in itself too.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
