"""The arithmetic of a perturbation, in blocks of weights, and the memory that it keeps between steps.

``tests/sharpness/plain_epsilon.py`` has the same mathematics in 15 lines, and tests compare the two.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .normalization import NormalizationOperator, strung
from .shards import Shards, diagonals_over_shards, is_sharded, local, shards_of

# Elements of a block. A CPU is fast while a block and its temporaries stay in its cache. An accelerator is
# fast with few launches; there the limit bounds the temporary memory.
_CPU_BLOCK = 2**17
_ACCELERATOR_BLOCK = 2**24
# A CPU takes about as long to start an operation as to run it on this many elements.
_SMALL = 2**13
_PAGE = 4096  # bytes
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

#: Copies weights, the first list, into the second, and remembers to restore them.
Save = Callable[[list[Tensor], list[Tensor]], None]


class Ascent(NamedTuple):
    """What epsilon depends on beside T and g, the same for all blocks.

    Attributes:
        rho: radius of the region, negative to go down.
        q: order of the norm of T g.
        inverse: 1 / ||T g||_q, a scalar tensor; 0 if the norm is zero or not finite.
        usable: whether the norm is neither zero nor infinite nor NaN, a scalar tensor.
    """

    rho: float
    q: float
    inverse: Tensor
    usable: Tensor


class Block:
    """Weights, or flat slices of them, that are processed together.

    They have the same device, dtype, operator and shards. The block holds the backup copy of each, its
    float32 master if it has one, and its index among all slices.

    Attributes:
        in_place: whether the block moves its weights. Otherwise it writes w + epsilon into the copies. The
            caller makes these the data of the parameters, and no weight is copied away and back.
    """

    in_place = True

    def __init__(
        self, operator: NormalizationOperator, eta: float, dtype: torch.dtype, shards: Shards | None = None
    ):
        self.operator, self.eta, self.shards = operator, eta, shards
        self.working_dtype = torch.promote_types(dtype, torch.float32)
        self.numbers: list[int] = []
        self.weights: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.masters: list[Tensor] = []
        # Set from outside, for one move, if the diagonals depend on other processes or on the optimizer.
        self.diagonals: list[Tensor] | None = None
        self.size = 0

    def append(self, number: int, weight: Tensor, copy: Tensor, *master: Tensor) -> None:
        """Add the slice with this *number*: a part of a weight, of its copy and of its master, if any."""
        self.numbers.append(number)
        self.weights.append(weight)
        self.copies.append(copy)
        self.masters += master
        self.size += weight.numel()

    def norms(self, gradients: list[Tensor], order: float, unit: Tensor | None) -> list[Tensor]:
        """Return norms whose common norm is ||T g||_order of the block; with *unit*, in multiples of it."""
        normalized = self._normalized(gradients, self._diagonals())
        if unit is not None:
            divisor = torch.where(unit > 0, unit, 1.0).to(normalized[0].device)
            normalized = list(torch._foreach_div(normalized, divisor))
        return list(torch._foreach_norm(normalized, order))

    def move(self, gradients: list[Tensor], ascent: Ascent, save: Save) -> None:
        """Add epsilon to the weights, after *save* has been given them and their copies."""
        save(self.weights, self.copies)
        diagonals, self.diagonals = self._diagonals(), None
        normalized = self._normalized(gradients, diagonals)
        epsilon = torch._foreach_mul(normalized, ascent.inverse.to(normalized[0].device))
        # The host has not read `usable` (that would synchronize). Multiply bit patterns, because 0 * inf and
        # 0 * NaN are NaN.
        if ascent.usable.device.type != "cpu":
            bits = [e.view(_BITS[e.dtype]) for e in epsilon]
            torch._foreach_mul_(bits, ascent.usable.to(bits[0]))
        if ascent.q == 1.0:  # |T g|^0 = 1; epsilon holds T g / ||T g||, or 0
            torch._foreach_sign_(epsilon)
        elif ascent.q != 2.0:
            powers = torch._foreach_pow(torch._foreach_abs(epsilon), ascent.q - 1.0)
            epsilon = torch._foreach_mul(powers, torch._foreach_sign(epsilon))
        if diagonals is not None:
            torch._foreach_mul_(epsilon, diagonals)
        if self.masters:
            # Add in float32 and round once: most of epsilon is below the resolution of half precision.
            torch._foreach_mul_(epsilon, ascent.rho)
            torch._foreach_copy_(self.weights, torch._foreach_add(self.masters, epsilon))
        else:
            torch._foreach_add_(self.weights, epsilon, alpha=ascent.rho)

    def _diagonals(self) -> list[Tensor] | None:
        """Return the diagonal of T for each slice, in at least float32; ``None`` if T = 1."""
        if self.diagonals is not None:
            return self.diagonals
        weights = _in_dtype(self.masters or self.weights, self.working_dtype)
        return self.operator.diagonal(weights, self.eta)

    def _normalized(self, gradients: list[Tensor], diagonals: list[Tensor] | None) -> list[Tensor]:
        """Return T g, in at least float32; g itself if T = 1, when *diagonals* is ``None``."""
        gradients = _in_dtype(gradients, self.working_dtype)
        return gradients if diagonals is None else list(torch._foreach_mul(gradients, diagonals))


class FlatBlock(Block):
    """A block for the common case on a CPU: few passes over memory, few operations.

    It needs full precision, no masters, p = 2 and an operator with a flat form. It holds one flat slice of a
    large weight, or many small weights: these it joins into one vector first, since starting an operation
    takes longer than running it on a small weight.
    """

    def use(self, scratch: Tensor) -> None:
        """Compute in this flat memory. All blocks share it, so that it stays in the cache."""
        self._scratch = scratch[: self.size]
        self._parts = self._scratch.split([weight.numel() for weight in self.weights])
        # Keeps T^2 g from the norm to the move.
        self._direction = self.copies[0] if len(self.weights) == 1 else torch.empty_like(self._scratch)
        # The flat form takes -eta as a tensor. Make it once: a new tensor in each step costs time.
        self._minus_eta = torch.tensor(-self.eta, dtype=scratch.dtype)

    def norms(self, gradients: list[Tensor], order: float, unit: Tensor | None) -> list[Tensor]:
        gradient = strung(gradients, self._scratch)
        direction = self.operator.flat_direction(gradient, self.weights, self._minus_eta, self._direction)
        self._has_direction = direction is self._direction
        return [torch.dot(direction, gradient).sqrt_()]

    def move(self, gradients: list[Tensor], ascent: Ascent, save: Save) -> None:
        # With p = 2, epsilon = rho / ||T g|| * T^2 g.
        scale = ascent.rho * ascent.inverse.item()
        if scale == 0.0:  # the direction may be inf or NaN, and 0 * inf and 0 * NaN are NaN
            if not self.in_place:
                self.copies[0].copy_(self.weights[0])
            return
        direction = self._direction if self._has_direction else strung(gradients, self._direction)
        weights = strung(self.weights, self._scratch)
        torch.add(weights, direction, alpha=scale, out=self._scratch if self.in_place else self.copies[0])
        if self.in_place:
            save(self.weights, self.copies)
            torch._foreach_copy_(self.weights, self._parts)


class Blocks:
    """The weights of a perturbation in blocks, and the memory that is kept between steps.

    On a CPU, new memory in each step costs more than all of the arithmetic.

    Args:
        weights: those that may get a gradient.
        masters: the float32 master of each half-precision weight that has one.
    """

    def __init__(self, weights: list[Tensor], masters: Mapping[Tensor, Tensor]):
        self._weights, self._masters = weights, masters
        self._copies: dict[Tensor, Tensor] = {}
        # What the blocks were planned for. They are planned again when it changes.
        self._forms: list[tuple] = []
        # Elements of a slice of each weight; None for a weight that is not cut.
        self._limits: dict[Tensor, int | None] = {}
        self._blocks: list[Block] = []
        # The weights that are not moved in place, and where w + epsilon is written.
        self.displaced: dict[Tensor, Tensor] = {}
        # Weights whose T is a norm over several processes: their operators, and the block of each.
        self._over_shards: dict[Tensor, NormalizationOperator] = {}
        self._alone: dict[Tensor, Block] = {}

    def with_gradients(
        self,
        gradients: Mapping[Tensor, Tensor],
        diagonals: Mapping[Tensor, Tensor] | None,
        operator_of: Callable[[Tensor], NormalizationOperator],
        eta: float,
        p: float,
        *settings: Hashable,
    ) -> list[tuple[Block, list[Tensor]]]:
        """Return the weights in blocks, each block with its gradients.

        The blocks of the last step serve again unless an argument has changed, or the memory or form of a
        tensor. Gradients are not kept.

        Args:
            gradients: this process's part of the gradient of each weight that has one.
            diagonals: its part of the diagonal of T of each of these weights, if all have the operator
                ``GIVEN``; otherwise ``None``.
            operator_of: returns the normalization operator of a weight.
            eta: stability term.
            p: order of the norm that bounds the region.
            settings: what *operator_of* depends on.
        """
        present = [(w, part, g) for w, g in gradients.items() if (part := local(w)).numel() > 0]
        forms: list[tuple] = [(eta, p, *settings)]
        for w, part, g in present:
            form = (id(w), part.data_ptr(), part.shape, part.stride(), part.dtype, part.device)
            forms.append((*form, g.stride(), g.dtype))
        if self._masters:
            masters = (self._masters[w] for w, _, _ in present if w in self._masters)
            forms += [(m.data_ptr(), m.stride()) for m in masters]
        if forms != self._forms:
            self._forms = []  # plan again next time if an exception interrupts this plan
            self._plan([w for w, _, _ in present], gradients, operator_of, eta, p)
            self._forms = forms
        # Every process takes part, whether or not it has a gradient: the others wait for it.
        for weight, diagonal in diagonals_over_shards(self._over_shards, eta).items():
            if weight in self._alone:
                self._alone[weight].diagonals = [diagonal]
        slices = [piece for w, _, g in present for piece in _slices(g, self._limits[w])]
        if diagonals is not None:
            of_slices = [piece for w, _, _ in present for piece in _slices(diagonals[w], self._limits[w])]
            for block in self._blocks:
                block.diagonals = [of_slices[number] for number in block.numbers]
        return [(block, [slices[number] for number in block.numbers]) for block in self._blocks]

    def _plan(
        self,
        parameters: list[Tensor],
        gradients: Mapping[Tensor, Tensor],
        operator_of: Callable[[Tensor], NormalizationOperator],
        eta: float,
        p: float,
    ) -> None:
        """Cut *parameters* into slices, and put these into blocks.

        On a CPU, each slice of a large weight has a block of its own, and small weights share fast blocks. On
        an accelerator, whatever can share a block does.
        """
        self._limits, self._blocks, self._alone, self.displaced = {}, [], {}, {}
        self._over_shards = {w: operator_of(w) for w in self._weights if is_sharded(w)}
        open_blocks: dict[tuple, Block] = {}
        memory: dict[torch.dtype, Tensor] = {}
        numbers = itertools.count()
        unshared = _alone_in_their_storage(self._weights)
        for parameter in parameters:
            operator, part, copy = operator_of(parameter), local(parameter).detach(), self._copy_of(parameter)
            dtype, shards = part.dtype, shards_of(parameter)
            masters = [local(self._masters[parameter]).detach()] if parameter in self._masters else []
            tensors = [part, copy, *masters]
            on_cpu = part.device.type == "cpu"
            size = _CPU_BLOCK if on_cpu else _ACCELERATOR_BLOCK
            flat = all(tensor.is_contiguous() for tensor in (*tensors, gradients[parameter]))
            flat = flat and operator.has_flat_form
            self._limits[parameter] = size if flat else None
            fast = flat and on_cpu and p == 2.0 and not masters
            fast = fast and dtype == gradients[parameter].dtype in (torch.float32, torch.float64)
            small = fast and part.numel() <= _SMALL
            if fast and not small and parameter in unshared:
                self.displaced[parameter] = copy
            # T comes from other processes, so the block has to know whose it is.
            over_shards = shards_of(parameter, operator.summed_dims(parameter)) is not None
            alone = over_shards or (on_cpu and not small)
            key = (part.device, dtype, operator, len(tensors), fast, shards)
            for slices in zip(*(_slices(tensor, self._limits[parameter]) for tensor in tensors)):
                block = None if alone else open_blocks.get(key)
                if block is None or block.size + slices[0].numel() > size:
                    block = (FlatBlock if fast else Block)(operator, eta, dtype, shards)
                    block.in_place = parameter not in self.displaced
                    self._blocks.append(block)
                    if not alone:
                        open_blocks[key] = block
                block.append(next(numbers), *slices)
            if over_shards:
                self._alone[parameter] = block
        for block in self._blocks:
            if isinstance(block, FlatBlock):
                dtype = block.working_dtype
                if dtype not in memory:
                    memory[dtype] = torch.empty(_CPU_BLOCK, dtype=dtype)
                block.use(memory[dtype])

    def _copy_of(self, parameter: Tensor) -> Tensor:
        """Return memory for a copy of this process's part: that of the last step, if the form is the same."""
        copy, part = self._copies.get(parameter), local(parameter)
        form = (part.shape, part.stride(), part.dtype, part.device)
        if copy is None or (copy.shape, copy.stride(), copy.dtype, copy.device) != form:
            copy = self._copies[parameter] = _memory_for(part)
        return copy


def _in_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    # Ask first: to() takes ten times as long where nothing is to be done, and there are hundreds of tensors.
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


def _memory_for(weight: Tensor) -> Tensor:
    """Return memory for a copy of *weight*."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return torch.empty_like(weight, requires_grad=False)
    # Give the copy another offset within its memory page than the weight has, by half a page. With the same
    # offset a CPU takes a read for one of what it has just written (4K aliasing), and waits.
    itemsize = weight.element_size()
    memory = torch.empty(weight.numel() + _PAGE // itemsize, dtype=weight.dtype)
    start = (weight.data_ptr() + _PAGE // 2 - memory.data_ptr()) % _PAGE // itemsize
    return memory[start : start + weight.numel()].view(weight.shape)


def _alone_in_their_storage(weights: list[Tensor]) -> set[Tensor]:
    """Return those of *weights* on a CPU that fill a storage of which no other one has a part."""
    strided = (w for w in weights if w.device.type == "cpu" and w.layout == torch.strided)
    storages = {w: w.untyped_storage() for w in strided if type(w) in (Tensor, torch.nn.Parameter)}
    users = Counter(storage.data_ptr() for storage in storages.values())
    return {
        w
        for w, storage in storages.items()
        if users[storage.data_ptr()] == 1 and storage.nbytes() == w.numel() * w.element_size()
    }


def _slices(tensor: Tensor, limit: int | None) -> tuple[Tensor, ...]:
    """Return flat slices of *tensor* with at most *limit* elements; without a limit, the tensor as it is."""
    if limit is None:
        return (tensor,)
    flat = tensor.view(-1)
    return flat.split(limit) if flat.numel() > limit else (flat,)
