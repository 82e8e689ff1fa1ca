"""The arithmetic of a perturbation: ||T g||_q, and w + epsilon.

``tests/sharpness/plain_epsilon.py`` has the same mathematics in 15 lines, and tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .normalization import PRECOMPUTED, NormalizationOperator
from .shards import Shards

#: Is told of weights that are about to move, the first list, and of their copies.
Remember = Callable[[list[Tensor], list[Tensor]], None]


class Ascent(NamedTuple):
    """What epsilon depends on beside T and g, the same for all blocks.

    Attributes:
        rho: radius of the region, negative to go down.
        q: order of the norm of T g.
        inverse: 1 / ||T g||_q, a scalar tensor; 0 if the norm is zero or not finite.
        is_zero: whether epsilon is 0 because of such a norm, a scalar tensor; ``None`` if the host has read
            the norm, and it is not.
    """

    rho: float
    q: float
    inverse: Tensor
    is_zero: Tensor | None


class Block:
    """Weights, or flat pieces of them, that are processed together in flat memory.

    They have the same device, dtype, operator and shards. With ||T g||_q of all blocks,

        epsilon = rho * T * sign(T g) * (|T g| / ||T g||_q)^(q - 1).

    Attributes:
        indices: of the pieces among those of all weights.
        parameters: of which the pieces are.
        weights: the pieces themselves.
        masters: their float32 masters; empty if they have none.
        copy: flat memory for a copy of the weights, from which T is computed and they are restored.
        copies: its parts, in the form of the weights.
        diagonals: T of the weights, between steps ``None``. It is set from outside if it is ``PRECOMPUTED``.
        in_place: whether the weights themselves move (``cpu.py`` has blocks of which they do not).
        overlaps: whether there is one weight, and another block moves a part of its memory too.
        size: number of elements.
    """

    def __init__(self, operator: NormalizationOperator, eta: float, shards: Shards | None = None):
        self.operator, self.eta, self.shards = operator, eta, shards
        self.indices: list[int] = []
        self.parameters: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.copy: Tensor | None = None
        self.diagonals: list[Tensor] | None = None
        self.in_place, self.overlaps = True, False
        self.size = 0

    def append(self, index: int, parameter: Tensor, weight: Tensor, *master: Tensor) -> None:
        """Add the piece *weight* of *parameter*, and its master if there is one."""
        self.indices.append(index)
        self.parameters.append(parameter)
        self.weights.append(weight)
        self.masters += master
        self.size += weight.numel()

    def use(self, memory: Tensor, keeps: bool) -> None:
        """Compute in this flat *memory*.

        If the block *keeps* it from the norm to the move, T g is computed once. Otherwise blocks take turns.
        """
        self.memory, self._keeps = memory[: self.size], keeps
        self.parts = in_form_of(self.weights, self.memory)
        if self.copy is None:
            self.copy = memory.new_empty(self.size, dtype=self.weights[0].dtype)
        self.copies = in_form_of(self.weights, self.copy)
        contiguous = all(weight.is_contiguous() for weight in self.weights)
        self._flat_weights = [w if w.dim() == 1 else w.view(-1) for w in self.weights] if contiguous else None

    def norms(self, gradients: list[Tensor], order: float, unit: Tensor | None) -> list[Tensor]:
        """Return norms whose common norm is ||T g||_order of the block; with *unit*, in multiples of it."""
        if self._flat_weights is None:
            torch._foreach_copy_(self.copies, self.weights)
        else:  # the same in fewer operations
            torch.cat(self._flat_weights, out=self.copy)
        diagonals = self._normalize(gradients)
        self._has_normalized = self._keeps and unit is None
        if self._has_normalized:
            self.diagonals = diagonals
        if unit is not None:
            self.memory.div_(torch.where(unit > 0, unit, 1.0).to(self.memory.device))
        return [torch.linalg.vector_norm(self.memory, order)]

    def move(self, gradients: list[Tensor], ascent: Ascent, remember: Remember) -> None:
        """Add epsilon to the weights, after *remember* has been told of them."""
        epsilon = self.memory
        diagonals = self.diagonals if self._has_normalized else self._normalize(gradients)
        epsilon.mul_(ascent.inverse.to(epsilon.device))
        if ascent.is_zero is not None:  # T g may be inf or NaN, and 0 * inf and 0 * NaN are NaN
            epsilon.masked_fill_(ascent.is_zero.to(epsilon.device), 0.0)
        if ascent.q == 1.0:
            epsilon.sign_()
        elif ascent.q != 2.0:
            torch.copysign(epsilon.abs().pow_(ascent.q - 1.0), epsilon, out=epsilon)
        self._multiply(diagonals)
        remember(self.weights, self.copies)
        if not self.masters:
            torch._foreach_add_(self.weights, self.parts, alpha=ascent.rho)
            return
        # Add in float32 and round once: most of epsilon is below the resolution of half precision.
        epsilon.mul_(ascent.rho)
        torch._foreach_add_(self.parts, self.masters)
        if self.overlaps:
            self.parts[0].add_(self.weights[0].to(epsilon.dtype) - self.copies[0])
        torch._foreach_copy_(self.weights, self.parts)

    def _normalize(self, gradients: list[Tensor]) -> list[Tensor] | None:
        """Put T g into the memory, and return T."""
        diagonals = self._diagonals()
        torch._foreach_copy_(self.parts, gradients)
        self._multiply(diagonals)
        return diagonals

    def _multiply(self, diagonals: list[Tensor] | None) -> None:
        if diagonals is not None:
            torch._foreach_mul_([self.memory] if self.operator.is_element_wise else self.parts, diagonals)

    def _diagonals(self) -> list[Tensor] | None:
        """Return T of all weights as one, if it is element-wise, or of each of them; ``None`` if T = 1."""
        if self.operator is PRECOMPUTED:
            return self.diagonals
        if not self.operator.is_element_wise:
            at_w = self.masters or (self.copies if self.overlaps else self.weights)
            weights = [weight.to(self.memory.dtype) for weight in at_w]
        elif self.masters:
            torch._foreach_copy_(self.parts, self.masters)
            weights = [self.memory]
        else:
            weights = [self.copy.to(self.memory.dtype)]
        return self.operator.diagonal(weights, self.eta)


class Placement(NamedTuple):
    """Which blocks take a weight.

    Attributes:
        kind: of the blocks.
        size: the most elements of a block.
        is_cut: whether the weight goes there in flat pieces of at most so many elements.
        is_shared: whether other weights go into the same block.
    """

    kind: type[Block]
    size: int
    is_cut: bool
    is_shared: bool


def in_form_of(weights: list[Tensor], memory: Tensor) -> list[Tensor]:
    """Return parts of flat *memory* in the shapes of *weights* and, of those that are dense, the strides."""
    parts = memory.split([weight.numel() for weight in weights])
    forms = [torch.empty_like(weight, device="meta") for weight in weights]
    return [part.as_strided(form.shape, form.stride()) for part, form in zip(parts, forms)]
