"""The normalization operators T_w (Section 3 of the paper). Nothing else in the library knows them.

To add one, write a class and name it in :data:`NORMALIZATIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# torch.nn.functional.mse_loss cannot write into given memory, and new memory costs more than the arithmetic.
# Hence this private name. test_the_flat_form_is_that_of_the_diagonal fails if torch changes it.
_squared_error = torch.ops.aten.mse_loss.out
_NO_REDUCTION = 0


class NormalizationOperator:
    """A diagonal matrix T_w + eta I for each weight.

    Attributes:
        has_flat_form: whether the class has :meth:`flat_direction`, which takes fewer passes over memory. It
            needs a T that is the same for a flat slice alone as within its weight.
    """

    has_flat_form = False

    def applied_to(self, weight: Tensor) -> NormalizationOperator:
        """Return the operator for *weight*: this one, unless a subclass chooses another by its shape."""
        return self

    def diagonal(self, weights: list[Tensor], eta: float) -> list[Tensor] | None:
        """Return the diagonal for each weight, in new memory and to be broadcast; ``None`` if T = 1."""
        raise NotImplementedError

    def summed_dims(self, weight: Tensor) -> tuple[int, ...]:
        """Return the dimensions of *weight* over which T is an l2 norm.

        If they are in shards, the squares are summed over the processes.
        """
        return ()

    def flat_direction(
        self, gradient: Tensor, weights: list[Tensor], minus_eta: Tensor, memory: Tensor
    ) -> Tensor:
        """Return T^2 g of a flat *gradient* and of flat *weights*, which joined are as long.

        The result is in *memory*, or *gradient* itself if T = 1.
        """
        raise NotImplementedError


class Identity(NormalizationOperator):
    """T = 1: makes ASAM plain SAM."""

    has_flat_form = True

    def diagonal(self, weights: list[Tensor], eta: float) -> None:
        return None

    def flat_direction(
        self, gradient: Tensor, weights: list[Tensor], minus_eta: Tensor, memory: Tensor
    ) -> Tensor:
        return gradient


class ElementWise(NormalizationOperator):
    """T_i = |w_i| + eta."""

    has_flat_form = True

    def diagonal(self, weights: list[Tensor], eta: float) -> list[Tensor]:
        diagonals = list(torch._foreach_abs(weights))
        torch._foreach_add_(diagonals, eta)
        return diagonals

    def flat_direction(
        self, gradient: Tensor, weights: list[Tensor], minus_eta: Tensor, memory: Tensor
    ) -> Tensor:
        magnitude = torch.abs(strung(weights, memory), out=memory)
        # T^2 = (|w| + eta)^2 is the squared error between |w| and -eta, for which torch has one operation.
        return _squared_error(magnitude, minus_eta, _NO_REDUCTION, out=memory).mul_(gradient)


class Given(NormalizationOperator):
    """T comes from outside, such as from the optimizer's state, and is given to the blocks of weights."""


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

    It is not in the paper. Scaling a whole layer does not change adaptive sharpness, and small weights move
    as far as the others of their layer.
    """

    def applied_to(self, weight: Tensor) -> NormalizationOperator:
        return self if weight.dim() >= 2 else ELEMENT_WISE

    def summed_dims(self, weight: Tensor) -> tuple[int, ...]:
        return tuple(range(weight.dim()))


# How torch.nn.utils.parametrize calls the tensors that a parameter is made of: one, or several with a number.
_PARAMETRIZED = re.compile(r"\bparametrizations\.([^.]+)\.original\d*$")

IDENTITY, ELEMENT_WISE, GIVEN = Identity(), ElementWise(), Given()

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


def strung(tensors: list[Tensor], memory: Tensor) -> Tensor:
    """Return the flat *tensors* joined into one vector, in *memory* if they are more than one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, out=memory)
