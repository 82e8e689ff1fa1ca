"""The normalization operator T_w (Section 3 of the paper), a diagonal matrix for every choice here."""

from __future__ import annotations

import torch
from torch import Tensor

#: ``none``: T_w = I, which makes ASAM plain SAM. ``element-wise``: |w_i| + eta. ``filter-wise``
#: (Equation 5): the l2 norm of a weight's convolution filter + eta, and |w_i| + eta outside of filters.
NORMALIZATIONS = ("none", "element-wise", "filter-wise")


def operator_of(name: str, weight: Tensor, normalization: str, normalize_bias: bool) -> str:
    """Return which of :data:`NORMALIZATIONS` applies to the parameter *weight* called *name*.

    A bias, that is a parameter whose own name ends in ``bias``, keeps T = 1 unless *normalize_bias*
    (Section 3: constants make adaptive sharpness invariant to translation). A convolution weight is a
    parameter with three or more dimensions; slice j of its first dimension is filter j.
    """
    if normalization == "none" or (name.endswith("bias") and not normalize_bias):
        return "none"
    if normalization == "filter-wise" and weight.dim() < 3:
        return "element-wise"
    return normalization


def diagonal(weights: list[Tensor], operator: str, eta: float) -> list[Tensor]:
    """Return the diagonal of T_w + eta I for each of *weights*, in the shape of the weight, or in one
    that broadcasts to it. *operator* is ``element-wise`` or ``filter-wise``."""
    if operator == "element-wise":
        diagonals = torch._foreach_abs(weights)
    else:
        diagonals = [
            torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
            for weight in weights
        ]
    torch._foreach_add_(diagonals, eta)
    return diagonals
