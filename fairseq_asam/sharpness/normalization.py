"""The normalization operators T_w (Section 3 of the paper). Nothing else in the library knows them.

To add one, write a class and name it in :data:`NORMALIZATIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# torch has no public functions for these two that write into memory of ours.
# tests/sharpness/test_normalization.py holds them against a plain computation.
_squared_error = torch.ops.aten.mse_loss.out
_squared_error_gradient = torch.ops.aten.mse_loss_backward.grad_input
_NO_REDUCTION = 0


class NormalizationOperator:
    """A diagonal matrix T_w + eta I for each weight.

    Attributes:
        has_flat_form: whether a flat piece of a weight has the same T alone as within its weight, and the
            class has :meth:`flat_norm` and :meth:`flat_square`, which cost fewer passes over memory.
    """

    has_flat_form = False

    def applied_to(self, weight: Tensor) -> NormalizationOperator:
        """Return the operator that applies to *weight*: this one, unless a subclass chooses by its shape."""
        return self

    def diagonal(self, weights: list[Tensor], eta: float) -> list[Tensor] | None:
        """Return the diagonal for each of *weights*, in a shape that broadcasts to that of the weight, in
        new memory; ``None`` where it is 1 everywhere."""
        raise NotImplementedError

    def summed_dims(self, weight: Tensor) -> tuple[int, ...]:
        """Return the dimensions of *weight* over which T is an l2 norm. Where these are in shards, squares
        are added up over the processes."""
        return ()

    def flat_norm(self, gradient: Tensor, weights: list[Tensor], minus_eta: Tensor, memory: Tensor) -> Tensor:
        """Return ||T g||_2 of a flat *gradient* and of flat *weights*, one after another. *memory* is scratch
        space of the gradient's size."""
        raise NotImplementedError

    def flat_square(self, weights: list[Tensor], minus_eta: Tensor, memory: Tensor) -> Tensor | None:
        """Return T^2 of flat *weights*, one after another, in *memory*, which may be that of the only one;
        ``None`` where it is 1 everywhere."""
        raise NotImplementedError


class Identity(NormalizationOperator):
    """T = 1: makes ASAM plain SAM."""

    has_flat_form = True

    def diagonal(self, weights: list[Tensor], eta: float) -> None:
        return None

    def flat_norm(self, gradient: Tensor, weights: list[Tensor], minus_eta: Tensor, memory: Tensor) -> Tensor:
        return torch.dot(gradient, gradient).sqrt_()

    def flat_square(self, weights: list[Tensor], minus_eta: Tensor, memory: Tensor) -> None:
        return None


class ElementWise(NormalizationOperator):
    """T_i = |w_i| + eta."""

    has_flat_form = True

    def diagonal(self, weights: list[Tensor], eta: float) -> list[Tensor]:
        diagonals = list(torch._foreach_abs(weights))
        torch._foreach_add_(diagonals, eta)
        return diagonals

    # T^2 is the squared error between |w| and -eta, and 2 T g its gradient. torch computes each in one pass.

    def flat_norm(self, gradient: Tensor, weights: list[Tensor], minus_eta: Tensor, memory: Tensor) -> Tensor:
        magnitude = torch.abs(strung(weights, memory), out=memory)
        twice = _squared_error_gradient(gradient, magnitude, minus_eta, _NO_REDUCTION, grad_input=memory)
        return torch.dot(twice, twice).sqrt_().mul_(0.5)

    def flat_square(self, weights: list[Tensor], minus_eta: Tensor, memory: Tensor) -> Tensor:
        magnitude = torch.abs(strung(weights, memory), out=memory)
        return _squared_error(magnitude, minus_eta, _NO_REDUCTION, out=memory)


class _NormOverDims(NormalizationOperator):
    """T = the l2 norm of the weight over :meth:`summed_dims` + eta."""

    def diagonal(self, weights: list[Tensor], eta: float) -> list[Tensor]:
        dims = [self.summed_dims(weight) for weight in weights]
        diagonals = [torch.linalg.vector_norm(w, dim=d, keepdim=True) for w, d in zip(weights, dims)]
        torch._foreach_add_(diagonals, eta)
        return diagonals


class FilterWise(_NormOverDims):
    """T = ||f_j||_2 + eta for all weights of convolution filter j (Equation 5), and element-wise elsewhere.

    A convolution weight has three or more dimensions; slice j of its first dimension is filter j.
    """

    def applied_to(self, weight: Tensor) -> NormalizationOperator:
        return self if weight.dim() >= 3 else ELEMENT_WISE

    def summed_dims(self, weight: Tensor) -> tuple[int, ...]:
        return tuple(range(1, weight.dim()))


class LayerWise(_NormOverDims):
    """T = ||w||_2 + eta for all of a weight with two or more dimensions, and element-wise elsewhere.

    The paper does not have it. Scaling a whole layer leaves its adaptive sharpness alone, and weights that
    are zero or small move as far as the others of their layer.
    """

    def applied_to(self, weight: Tensor) -> NormalizationOperator:
        return self if weight.dim() >= 2 else ELEMENT_WISE

    def summed_dims(self, weight: Tensor) -> tuple[int, ...]:
        return tuple(range(weight.dim()))


IDENTITY, ELEMENT_WISE = Identity(), ElementWise()

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
        normalize_bias: if not, a bias keeps T = 1 (Section 3: adding a constant to a layer's output then
            leaves adaptive sharpness alone).
    """
    if is_bias(name) and not normalize_bias:
        return IDENTITY
    return NORMALIZATIONS[normalization].applied_to(weight)


def is_bias(name: str) -> bool:
    """Return whether the parameter called *name* is a bias: whether ``bias`` is a word of its own name, as in
    ``fc.bias``, ``lstm.bias_ih_l0`` and ``attention.in_proj_bias``, but not in ``bias_net.weight``."""
    return "bias" in name.rsplit(".", 1)[-1].split("_")


def strung(tensors: list[Tensor], memory: Tensor) -> Tensor:
    """Return the flat *tensors* one after another, in *memory* if they are more than one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, out=memory)
