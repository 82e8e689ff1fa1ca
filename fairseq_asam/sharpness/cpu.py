"""What makes a perturbation fast on a CPU, and exists for CPUs alone.

A CPU is fast while what it computes with stays in its cache, and slow with new memory and many small
operations. Accelerators take the arithmetic of ``kernels.py`` as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from .kernels import Ascent, Block, Placement, Remember
from .normalization import ELEMENT_WISE, IDENTITY, NormalizationOperator

# Elements of a block. It stays in the cache, with what is computed from it.
_BLOCK_SIZE = 2**17
# A CPU takes about as long to start an operation as to run it on so many elements.
_SMALL = 2**13
_PAGE = 4096  # bytes

# torch.nn.functional.mse_loss cannot write into given memory, and new memory costs more than the arithmetic.
# Hence this private name. test_the_fast_form_is_that_of_the_diagonal fails if torch changes it.
_squared_error = torch.ops.aten.mse_loss.out
_NO_REDUCTION = 0


def _element_wise(gradient: Tensor, weights: list[Tensor], minus_eta: Tensor, memory: Tensor) -> Tensor:
    magnitude = torch.abs(joined(weights, memory), out=memory)
    # T^2 = (|w| + eta)^2 is the squared error between |w| and -eta, for which torch has one operation.
    return _squared_error(magnitude, minus_eta, _NO_REDUCTION, out=memory).mul_(gradient)


#: T^2 g with few passes over memory. A function takes a flat gradient, flat weights that joined are as long,
#: -eta and memory. The result is in that memory, or it is the gradient itself.
FAST: dict[NormalizationOperator, Callable[[Tensor, list[Tensor], Tensor, Tensor], Tensor]] = {
    ELEMENT_WISE: _element_wise,
    IDENTITY: lambda gradient, *_: gradient,
}


def is_on_cpu(tensor: Tensor) -> bool:
    """Return whether the forms for CPUs are used for *tensor*."""
    return tensor.device.type == "cpu"


class FastBlock(Block):
    """A block for the common case on a CPU: few passes over memory, few operations.

    It needs full precision, no masters, p = 2 and an operator in :data:`FAST`. It holds one flat piece of a
    large weight, or many small weights.

    If it does not move its weights in place, it writes w + epsilon into the copy. That becomes the memory of
    the parameter, and no weight is copied away and back.
    """

    def use(self, memory: Tensor, keeps: bool) -> None:
        super().use(memory, keeps)
        # Keeps T^2 g from the norm to the move.
        self._direction = self.copy if len(self.weights) == 1 else torch.empty_like(self.memory)
        # Make it once: a new tensor in each step costs time.
        self._minus_eta = torch.tensor(-self.eta, dtype=memory.dtype, device=memory.device)

    def norms(self, gradients: list[Tensor], order: float, unit: Tensor | None) -> list[Tensor]:
        gradient = joined(gradients, self.memory)
        direction = FAST[self.operator](gradient, self.weights, self._minus_eta, self._direction)
        self._has_direction = direction is self._direction
        return [torch.dot(direction, gradient).sqrt_()]

    def move(self, gradients: list[Tensor], ascent: Ascent, remember: Remember) -> None:
        # With p = 2, epsilon = rho / ||T g|| * T^2 g.
        scale = ascent.rho * ascent.inverse.item()
        if scale == 0.0:  # the direction may be inf or NaN, and 0 * inf and 0 * NaN are NaN
            if not self.in_place:
                self.copies[0].copy_(self.weights[0])
            return
        direction = self._direction if self._has_direction else joined(gradients, self._direction)
        weights = joined(self.weights, self.memory)
        torch.add(weights, direction, alpha=scale, out=self.memory if self.in_place else self.copy)
        if self.in_place:
            torch._foreach_copy_(self.copies, self.weights)
            remember(self.weights, self.copies)
            torch._foreach_copy_(self.weights, self.parts)


def placement(
    weight: Tensor, operator: NormalizationOperator, can_be_cut: bool, has_master: bool, p: float
) -> Placement:
    """Return which blocks take *weight*: small ones share fast blocks, and a piece of others has its own."""
    is_fast = can_be_cut and operator in FAST and p == 2.0 and not has_master
    is_fast = is_fast and weight.dtype in (torch.float32, torch.float64)
    is_shared = is_fast and weight.numel() <= _SMALL
    return Placement(FastBlock if is_fast else Block, _BLOCK_SIZE, can_be_cut, is_shared)


def joined(tensors: list[Tensor], memory: Tensor) -> Tensor:
    """Return the flat *tensors* as one vector of the dtype of *memory*, in it if they are more than one."""
    if len(tensors) > 1:
        return torch.cat(tensors, out=memory)
    # Ask first: to() takes ten times as long where nothing is to be done, and there are hundreds of tensors.
    return tensors[0] if tensors[0].dtype == memory.dtype else tensors[0].to(memory.dtype)


def memory_for_copy(weight: Tensor) -> Tensor:
    """Return flat memory for a copy of *weight*.

    It has another offset within its memory page than the weight has, by half a page. With the same offset a
    CPU takes a read for one of what it has just written (4K aliasing), and waits.
    """
    itemsize = weight.element_size()
    memory = torch.empty(weight.numel() + _PAGE // itemsize, dtype=weight.dtype, device=weight.device)
    start = (weight.data_ptr() + _PAGE // 2 - memory.data_ptr()) % _PAGE // itemsize
    return memory[start : start + weight.numel()]


def alone_in_their_storage(weights: list[Tensor]) -> set[Tensor]:
    """Return those of *weights* on a CPU that fill a storage and share it with no other weight."""
    strided = (w for w in weights if is_on_cpu(w) and w.layout == torch.strided)
    storages = {w: w.untyped_storage() for w in strided if type(w) in (Tensor, torch.nn.Parameter)}
    users = Counter(storage.data_ptr() for storage in storages.values())
    return {
        w
        for w, storage in storages.items()
        if users[storage.data_ptr()] == 1 and storage.nbytes() == w.numel() * w.element_size()
    }
