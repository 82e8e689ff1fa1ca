"""The first moment of an optimizer, the direction of Momentum-SAM (Becker et al., arXiv 2401.12033)."""

from __future__ import annotations

import torch
from torch import Tensor

#: What epsilon can be made of.
DIRECTIONS = ("gradient", "momentum")
#: Where the optimizers of torch and fairseq keep it, by the names of their own.
_KEYS = ("exp_avg", "momentum_buffer")


def first_moments(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the first moment of each weight that *optimizer* has stepped.

    Of Adam it is the running mean of the gradients (``exp_avg``), of SGD the ``momentum_buffer``.

    Raises:
        ValueError: the optimizer keeps none.
    """
    moments, others = {}, False
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = optimizer.state.get(weight, {})
            of_weight = [state[key] for key in _KEYS if isinstance(state.get(key), Tensor)]
            if of_weight:
                moments[weight] = of_weight[0]
            others = others or bool(state and not of_weight)
    if (others and not moments) or any(group.get("momentum") == 0 for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} keeps no first moment to take the direction of epsilon from: use an "
            "optimizer with momentum, such as Adam, or the direction gradient"
        )
    return moments
