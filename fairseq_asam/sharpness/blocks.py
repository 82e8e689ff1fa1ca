"""The arithmetic of a perturbation, in blocks of weights, and the memory that it keeps between steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .normalization import diagonal

aten = torch.ops.aten
NO_REDUCTION = 0

# Elements that go through the arithmetic together. On a CPU a block and its temporaries should stay in
# the cache; on an accelerator the number of launches counts, and the bound is on temporary memory.
_CPU_BLOCK = 2**19
_ACCELERATOR_BLOCK = 2**24
# A CPU takes as long to start an operation as to run it on about so many elements.
_SMALL = 2**15
_PAGE = 4096  # bytes
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Ascent(NamedTuple):
    """What epsilon depends on beside T and g: the radius, the order q, 1 / ||T g||_q, which is 0 where there
    is to be no epsilon, and whether there is to be one. The last two are tensors without dimensions."""

    rho: float
    q: float
    inverse: Tensor
    usable: Tensor


class Block:
    """Weights of one device, dtype and normalization operator, or flat pieces of weights, with their copies
    and masters, and with their numbers among all such."""

    def __init__(self, operator: str, eta: float, dtype: torch.dtype):
        self.operator, self.eta = operator, eta
        self.working_dtype = torch.promote_types(dtype, torch.float32)
        self.numbers: list[int] = []
        self.weights: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.masters: list[Tensor] = []
        self.size = 0

    def append(self, number: int, weight: Tensor, copy: Tensor, *master: Tensor) -> None:
        self.numbers.append(number)
        self.weights.append(weight)
        self.copies.append(copy)
        self.masters += master
        self.size += weight.numel()

    def norms(self, gradients: list[Tensor], order: float, unit: Tensor | None) -> list[Tensor]:
        """Norms whose norm is ||T g||_order over the block; with *unit*, in multiples of it."""
        normalized = self._normalized(gradients, self._diagonals())
        if unit is not None:
            divisor = torch.where(unit > 0, unit, 1.0).to(normalized[0].device)
            normalized = torch._foreach_div(normalized, divisor)
        return torch._foreach_norm(normalized, order)

    def move(self, gradients: list[Tensor], ascent: Ascent) -> None:
        """Add epsilon to the weights, of which there is a copy by now."""
        diagonals = self._diagonals()
        normalized = self._normalized(gradients, diagonals)
        epsilon = torch._foreach_mul(normalized, ascent.inverse.to(normalized[0].device))
        # Nobody has looked whether it is usable: 0 * inf and 0 * nan are nan, but 0 times their bits is 0.
        if ascent.usable.device.type != "cpu":
            bits = [e.view(_BITS[e.dtype]) for e in epsilon]
            torch._foreach_mul_(bits, ascent.usable.to(bits[0]))
        if ascent.q == 1.0:
            torch._foreach_sign_(epsilon)
        elif ascent.q != 2.0:
            powers = torch._foreach_pow(torch._foreach_abs(epsilon), ascent.q - 1.0)
            epsilon = torch._foreach_mul(powers, torch._foreach_sign(epsilon))
        if diagonals is not None:
            torch._foreach_mul_(epsilon, diagonals)
        if self.masters:
            torch._foreach_mul_(epsilon, ascent.rho)
            torch._foreach_copy_(self.weights, torch._foreach_add(self.masters, epsilon))
        else:
            torch._foreach_add_(self.weights, epsilon, alpha=ascent.rho)

    def _diagonals(self) -> list[Tensor] | None:
        """The diagonal of T for each weight, in at least float32; ``None`` where T = 1."""
        if self.operator == "none":
            return None
        weights = [weight.to(self.working_dtype) for weight in self.masters or self.weights]
        return diagonal(weights, self.operator, self.eta)

    def _normalized(self, gradients: list[Tensor], diagonals: list[Tensor] | None) -> list[Tensor]:
        """T g, in at least float32; g itself where *diagonals*, those of T, are ``None``."""
        gradients = [gradient.to(self.working_dtype) for gradient in gradients]
        return gradients if diagonals is None else torch._foreach_mul(gradients, diagonals)


class FlatBlock(Block):
    """A block on a CPU, in full precision, without masters and for p = 2: one flat piece of a weight, or many
    small weights, which are strung together first.

    It takes the fewest passes over memory, and the fewest operations. T^2 is the squared error between |w|
    and -eta, and 2 T g its gradient, and PyTorch has either in one pass."""

    def use(self, scratch: Tensor, gradient: Tensor) -> None:
        """Compute in *scratch* and *gradient*, flat memory of at least the block's size that all blocks may
        share, so that it stays in the cache."""
        self._scratch, self._gradient = scratch[: self.size], gradient[: self.size]
        self._parts = self._scratch.split([weight.numel() for weight in self.weights])
        self._minus_eta = torch.tensor(-self.eta, dtype=scratch.dtype)

    def norms(self, gradients: list[Tensor], order: float, unit: Tensor | None) -> list[Tensor]:
        gradient = _strung(gradients, self._gradient)
        if self.operator == "none":
            return [torch.dot(gradient, gradient).sqrt_()]
        twice = aten.mse_loss_backward.grad_input(
            *(gradient, self._magnitudes(self._scratch), self._minus_eta, NO_REDUCTION),
            grad_input=self._scratch,
        )
        return [torch.dot(twice, twice).sqrt_().mul_(0.5)]

    def move(self, gradients: list[Tensor], ascent: Ascent) -> None:
        scale = ascent.rho * ascent.inverse.item()
        if scale == 0.0:  # 0 * inf and 0 * nan are nan
            return
        if self.operator == "none":
            torch._foreach_add_(self.weights, gradients, alpha=scale)
        elif len(self.weights) == 1:
            # within the weights, as there is a copy of them, to have less in the cache
            (weight,), (copy,), (gradient,) = self.weights, self.copies, gradients
            torch.addcmul(copy, self._squares(weight), gradient, value=scale, out=weight)
        else:
            self._squares(self._scratch).mul_(_strung(gradients, self._gradient))
            torch._foreach_add_(self.weights, self._parts, alpha=scale)

    def _squares(self, memory: Tensor) -> Tensor:
        """T^2, in *memory*."""
        return aten.mse_loss.out(self._magnitudes(memory), self._minus_eta, NO_REDUCTION, out=memory)

    def _magnitudes(self, memory: Tensor) -> Tensor:
        """|w|, in *memory*."""
        return torch.abs(_strung(self.weights, memory), out=memory)


class Blocks:
    """The weights of a perturbation in blocks, and what can be kept between steps: on a CPU, new memory for
    every step costs more than all of the arithmetic."""

    def __init__(self, operators: Mapping[Tensor, str], masters: Mapping[Tensor, Tensor]):
        self._operators, self._masters = operators, masters
        self._copies: dict[Tensor, Tensor] = {}
        self._forms: list[tuple] = []
        self._limits: dict[Tensor, int | None] = {}
        self._blocks: list[Block] = []

    def with_gradients(self, eta: float, p: float) -> list[tuple[Block, list[Tensor]]]:
        """The weights that have a gradient in blocks, each with its gradients. The blocks of the last step
        serve again unless a tensor has another place or form; the gradients are new, and not kept."""
        present = [w for w in self._operators if w.grad is not None and w.numel() > 0]
        forms: list[tuple] = [(eta, p)]
        forms += [
            (id(w), w.data_ptr(), w.shape, w.stride(), w.dtype, w.device, w.grad.stride(), w.grad.dtype)
            for w in present
        ]
        forms += [(m.data_ptr(), m.stride()) for m in map(self._masters.get, present) if m is not None]
        if forms != self._forms:
            self._forms = []
            self._plan(present, eta, p)
            self._forms = forms
        pieces = [piece for w in present for piece in _pieces(w.grad, self._limits[w])]
        return [(block, [pieces[number] for number in block.numbers]) for block in self._blocks]

    def _plan(self, parameters: list[Tensor], eta: float, p: float) -> None:
        """Cut *parameters* into pieces, and put these into blocks."""
        self._limits, self._blocks = {}, []
        open_blocks: dict[tuple, Block] = {}
        memory: dict[torch.dtype, Tensor] = {}
        numbers = itertools.count()
        for parameter in parameters:
            operator, dtype = self._operators[parameter], parameter.dtype
            masters = [self._masters[parameter].detach()] if parameter in self._masters else []
            tensors = [parameter.detach(), self._copy_of(parameter), *masters]
            on_cpu = parameter.device.type == "cpu"
            size = _CPU_BLOCK if on_cpu else _ACCELERATOR_BLOCK
            flat = all(tensor.is_contiguous() for tensor in (*tensors, parameter.grad))
            flat = flat and operator != "filter-wise"
            self._limits[parameter] = size if flat else None
            fast = flat and on_cpu and p == 2.0 and not masters
            fast = fast and dtype == parameter.grad.dtype in (torch.float32, torch.float64)
            alone = on_cpu and not (fast and parameter.numel() <= _SMALL)
            key = (parameter.device, dtype, operator, len(tensors), fast)
            for pieces in zip(*(_pieces(tensor, self._limits[parameter]) for tensor in tensors)):
                block = None if alone else open_blocks.get(key)
                if block is None or block.size + pieces[0].numel() > size:
                    block = (FlatBlock if fast else Block)(operator, eta, dtype)
                    self._blocks.append(block)
                    if not alone:
                        open_blocks[key] = block
                block.append(next(numbers), *pieces)
        for block in self._blocks:
            if isinstance(block, FlatBlock):
                dtype = block.working_dtype
                if dtype not in memory:
                    memory[dtype] = torch.empty(2, _CPU_BLOCK, dtype=dtype)
                block.use(*memory[dtype])

    def _copy_of(self, parameter: Tensor) -> Tensor:
        """Memory for a copy of *parameter*, new if that has changed its form since the last step."""
        copy = self._copies.get(parameter)
        form = (parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
        if copy is None or (copy.shape, copy.stride(), copy.dtype, copy.device) != form:
            copy = self._copies[parameter] = _memory_for(parameter)
        return copy


def _memory_for(weight: Tensor) -> Tensor:
    """Memory for a copy of *weight*."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return torch.empty_like(weight, requires_grad=False)
    # A CPU that copies between addresses with the same place in their pages takes them for one another, and
    # waits: begin half a page away from that of the weight.
    itemsize = weight.element_size()
    memory = torch.empty(weight.numel() + _PAGE // itemsize, dtype=weight.dtype)
    start = (weight.data_ptr() + _PAGE // 2 - memory.data_ptr()) % _PAGE // itemsize
    return memory[start : start + weight.numel()].view(weight.shape)


def _pieces(tensor: Tensor, limit: int | None) -> tuple[Tensor, ...]:
    """Flat pieces of *tensor* of at most *limit* elements; without a limit the tensor itself."""
    if limit is None:
        return (tensor,)
    flat = tensor.view(-1)
    return flat.split(limit) if flat.numel() > limit else (flat,)


def _strung(tensors: list[Tensor], memory: Tensor) -> Tensor:
    """The flat *tensors* one after another, in *memory* if they are more than one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, out=memory)
