"""The normalization operators T_w (Section 3 of the paper). Nothing else in the library knows them.

To add one, write a class and name it in :data:`NORMALIZATIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor


class NormalizationOperator:
    """A diagonal matrix T_w + eta I for each weight.

    Attributes:
        is_element_wise: whether T of a number depends on that number alone, so that weights may be cut and
            joined.
    """

    is_element_wise = False

    def applied_to(self, weight: Tensor) -> NormalizationOperator:
        """Return the operator for *weight*: this one, unless a subclass chooses another by its shape."""
        return self

    def diagonal(self, weights: list[Tensor], eta: float) -> list[Tensor] | None:
        """Return the diagonal for each weight, in new memory and to be broadcast; ``None`` if T = 1."""
        raise NotImplementedError

    def norm_dims(self, weight: Tensor) -> tuple[int, ...]:
        """Return the dimensions of *weight* over which T is an l2 norm.

        If they are in shards, the squares are summed over the processes.
        """
        return ()


class Identity(NormalizationOperator):
    """T = 1: makes ASAM plain SAM."""

    is_element_wise = True

    def diagonal(self, weights: list[Tensor], eta: float) -> None:
        return None


class ElementWise(NormalizationOperator):
    """T_i = |w_i| + eta."""

    is_element_wise = True

    def diagonal(self, weights: list[Tensor], eta: float) -> list[Tensor]:
        diagonals = list(torch._foreach_abs(weights))
        torch._foreach_add_(diagonals, eta)
        return diagonals


class Precomputed(NormalizationOperator):
    """T comes with each step: it is made of the optimizer's state, or of what other processes have."""


class _NormOverDims(NormalizationOperator):
    """T = the l2 norm of the weight over :meth:`norm_dims` + eta."""

    def diagonal(self, weights: list[Tensor], eta: float) -> list[Tensor]:
        dims = [self.norm_dims(weight) for weight in weights]
        diagonals = [torch.linalg.vector_norm(w, dim=d, keepdim=True) for w, d in zip(weights, dims)]
        torch._foreach_add_(diagonals, eta)
        return diagonals


class FilterWise(_NormOverDims):
    """T = ||f_j||_2 + eta for all weights of convolution filter j (Equation 5), and element-wise elsewhere.

    A convolution weight has three or more dimensions; slice j of its first dimension is filter j.
    """

    def applied_to(self, weight: Tensor) -> NormalizationOperator:
        return self if weight.dim() >= 3 else ELEMENT_WISE

    def norm_dims(self, weight: Tensor) -> tuple[int, ...]:
        return tuple(range(1, weight.dim()))


class LayerWise(_NormOverDims):
    """T = ||w||_2 + eta for all of a weight with two or more dimensions, and element-wise elsewhere.

    It is not in the paper. Scaling a whole layer does not change adaptive sharpness, and small weights move
    as far as the others of their layer.
    """

    def applied_to(self, weight: Tensor) -> NormalizationOperator:
        return self if weight.dim() >= 2 else ELEMENT_WISE

    def norm_dims(self, weight: Tensor) -> tuple[int, ...]:
        return tuple(range(weight.dim()))


# How torch.nn.utils.parametrize calls the tensors that a parameter is made of: one, or several with a number.
_PARAMETRIZED = re.compile(r"\bparametrizations\.([^.]+)\.original\d*$")

IDENTITY, ELEMENT_WISE, PRECOMPUTED = Identity(), ElementWise(), Precomputed()

#: The normalization operators by name.
NORMALIZATIONS: Mapping[str, NormalizationOperator] = {
    "none": IDENTITY,
    "element-wise": ELEMENT_WISE,
    "filter-wise": FilterWise(),
    "layer-wise": LayerWise(),
}


def operator_of(name: str, weight: Tensor, normalization: str, normalize_bias: bool) -> NormalizationOperator:
    """Return the operator for the parameter *weight* called *name*.

    Args:
        name: as ``model.named_parameters()`` has it.
        weight: the parameter, of which the shape counts.
        normalization: a key of :data:`NORMALIZATIONS`.
        normalize_bias: whether a bias is normalized; otherwise its T is 1 (Section 3: adaptive sharpness then
            does not change when a constant is added to a layer's output).
    """
    if is_bias(name) and not normalize_bias:
        return IDENTITY
    return NORMALIZATIONS[normalization].applied_to(weight)


def is_bias(name: str) -> bool:
    """Return whether the parameter called *name* is a bias.

    It is if ``bias`` is a word of the name's last part: ``fc.bias``, ``lstm.bias_ih_l0`` and
    ``attention.in_proj_bias`` are biases, and ``bias_net.weight`` is not. What torch parametrizes keeps its
    name: ``fc.parametrizations.bias.original`` is ``fc.bias``.
    """
    return "bias" in _PARAMETRIZED.sub(r"\1", name).rsplit(".", 1)[-1].split("_")
