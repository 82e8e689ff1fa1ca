"""Which weights of a perturbation are processed together, and the memory that is kept between steps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from . import cpu
from .kernels import Block, Placement
from .normalization import PRECOMPUTED, NormalizationOperator
from .shards import diagonals_over_shards, is_sharded, local, shards_of

OperatorOf = Callable[[Tensor], NormalizationOperator]
#: A tensor for each weight, or this process's part of it.
Parts = Mapping[Tensor, Tensor]
#: Blocks, each with the gradients of its weights.
WithGradients = list[tuple[Block, list[Tensor]]]

# Elements of a block on an accelerator. It bounds the temporary memory; a larger block takes fewer launches.
_BLOCK_SIZE = 2**24


class Blocks:
    """The weights of a perturbation in blocks, and the memory that is kept between steps.

    On an accelerator, the weights of a block share flat memory, so that a few operations serve all of them.
    On a CPU, a large weight has blocks of its own (``cpu.py``).

    Args:
        weights: those that may get a gradient.
        masters: the float32 master of each half-precision weight that has one.

    Attributes:
        places: the weights with gradients, each with its memory at w; ``None`` in place of this for shards.
        redirected: the weights that are not moved in place, and where w + epsilon is written.
    """

    def __init__(self, weights: list[Tensor], masters: Parts):
        self._weights, self._masters = weights, masters
        self._sharded = [weight for weight in weights if is_sharded(weight)]
        self.places: list[tuple[Tensor, Tensor | None]] = []
        self.redirected: dict[Tensor, Tensor] = {}
        # What the blocks were planned for. They are planned again when it changes.
        self._planned_for: list | None = None
        self._blocks: list[Block] = []
        # Elements of a flat piece of each weight; None for a weight that is processed as it is.
        self._piece_sizes: list[int | None] = []
        # Memory of each device and dtype, to compute in.
        self._memory: dict[tuple, Tensor] = {}
        self._copies_on_cpu: dict[Tensor, Tensor] = {}

    def __reduce__(self):
        # A copy of this, or one from a file, makes its own plan and memory.
        return Blocks, (self._weights, self._masters)

    def with_gradients(
        self,
        gradients: Parts,
        diagonals: Parts | None,
        operator_of: OperatorOf,
        eta: float,
        p: float,
        *settings: Hashable,
    ) -> WithGradients:
        """Return the weights in blocks, each block with its gradients.

        The blocks of the last step are used again, unless an argument or the memory or form of a weight has
        changed. Gradients are not kept. Call :meth:`free` after the blocks have moved.

        Args:
            gradients: this process's part of the gradient of each weight that has one.
            diagonals: its part of the diagonal of T of each of these weights, if all have the operator
                ``PRECOMPUTED``; otherwise ``None``.
            operator_of: returns the normalization operator of a weight.
            eta: stability term.
            p: order of the norm that bounds the region.
            settings: what *operator_of* depends on.
        """
        weights, pieces = list(gradients), list(gradients.values())
        tensors = [local(w) for w in weights] if self._sharded else weights
        if self._masters:
            tensors = tensors + [self._masters[w] for w in weights if w in self._masters]
        plan_for = [(eta, p, *settings), [*map(id, weights)], [*map(Tensor.data_ptr, tensors)]]
        plan_for += [t.shape for t in tensors], [*map(Tensor.stride, tensors)]
        if plan_for != self._planned_for:
            self._planned_for = None  # plan again next time if an exception interrupts this plan
            self._plan(weights, operator_of, eta, p)
            self._planned_for = plan_for
        for memory in self._memory.values():
            if memory.untyped_storage().nbytes() == 0:
                memory.untyped_storage().resize_(memory.nbytes)
        # Every process takes part, whether or not it has a gradient: the others wait for it.
        over_shards = diagonals_over_shards({w: operator_of(w) for w in self._sharded}, eta)
        for block in self._blocks:
            if block.operator is PRECOMPUTED:
                given = over_shards if diagonals is None else diagonals
                block.diagonals = [given[parameter] for parameter in block.parameters]
        if any(self._piece_sizes):
            pieces = [piece for g, size in zip(pieces, self._piece_sizes) for piece in _cut(g, size)]
        return [(block, [pieces[index] for index in block.indices]) for block in self._blocks]

    def free(self) -> None:
        """Free the memory that the blocks do not need until the next step."""
        for block in self._blocks:
            block.diagonals = None
        for memory in self._memory.values():
            with contextlib.suppress(RuntimeError):  # some kinds of devices cannot do so
                memory.untyped_storage().resize_(0)

    def _plan(self, weights: list[Tensor], operator_of: OperatorOf, eta: float, p: float) -> None:
        """Cut *weights* into pieces, and put these into blocks."""
        self.redirected, self._blocks, self._piece_sizes, self._memory = {}, [], [], {}
        self.places = []
        overlapping = _overlapping(weights)
        unshared = cpu.alone_in_their_storage(self._weights) - overlapping
        open_blocks: dict[object, Block] = {}
        indices = itertools.count()
        for parameter in weights:
            part, operator, shards = local(parameter).detach(), operator_of(parameter), shards_of(parameter)
            self.places.append((parameter, None if is_sharded(parameter) else part))
            if shards_of(parameter, operator.norm_dims(parameter)) is not None:
                operator = PRECOMPUTED
            master = [local(self._masters[parameter]).detach()] if parameter in self._masters else []
            can_be_cut = operator.is_element_wise and all(t.is_contiguous() for t in (part, *master))
            if cpu.is_on_cpu(part):
                place = cpu.placement(part, operator, can_be_cut, bool(master), p)
            else:
                is_large = part.numel() > _BLOCK_SIZE
                place = Placement(Block, _BLOCK_SIZE, can_be_cut and is_large, is_shared=True)
            shares_no_block = not place.is_shared or parameter in overlapping
            key = object() if shares_no_block else (part.device, part.dtype, operator, shards, len(master))
            kept = [self._copy_on_cpu(parameter)] if shares_no_block and cpu.is_on_cpu(part) else []
            if shares_no_block and place.kind is cpu.FastBlock and parameter in unshared:
                self.redirected[parameter] = kept[0].view(part.shape)
            self._piece_sizes.append(place.size if place.is_cut else None)
            for weight, *others in zip(*(_cut(t, self._piece_sizes[-1]) for t in (part, *master, *kept))):
                index, block = next(indices), open_blocks.get(key)
                if weight.numel() == 0:
                    continue
                if block is None or block.size + weight.numel() > place.size:
                    block = open_blocks[key] = place.kind(operator, eta, shards)
                    block.in_place = parameter not in self.redirected
                    block.overlaps = parameter in overlapping
                    block.copy = others[-1] if kept else None
                    self._blocks.append(block)
                block.append(index, parameter, weight, *others[: len(master)])
        self._share_memory()

    def _share_memory(self) -> None:
        """Give all blocks the same memory to compute in, or each its own, if that is little."""
        sizes = [block.size for block in self._blocks]
        keep = sum(sizes) <= _BLOCK_SIZE and not any(cpu.is_on_cpu(b.weights[0]) for b in self._blocks)
        begins = itertools.accumulate(sizes, initial=0) if keep else itertools.repeat(0)
        for block, begin in zip(self._blocks, begins):
            weight, size = block.weights[0], sum(sizes) if keep else max(sizes)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            key = weight.device, dtype
            if key not in self._memory:
                self._memory[key] = torch.empty(size, device=weight.device, dtype=dtype)
            block.use(self._memory[key][begin:], keep)

    def _copy_on_cpu(self, parameter: Tensor) -> Tensor:
        """Return flat memory for a copy of this process's part: that of the last plan if it fits."""
        part, copy = local(parameter), self._copies_on_cpu.get(parameter)
        if copy is None or (copy.numel(), copy.dtype) != (part.numel(), part.dtype):
            copy = self._copies_on_cpu[parameter] = cpu.memory_for_copy(part)
        return copy


def _cut(tensor: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Return flat pieces of *tensor* with at most *size* elements; without a size, the tensor as it is."""
    if size is None:
        return (tensor,)
    flat = tensor.reshape(-1)
    return flat.split(size) if flat.numel() > size else (flat,)


def _overlapping(weights: list[Tensor]) -> set[Tensor]:
    """Return those of *weights* that share memory with others. A gap within a weight counts as its memory."""
    overlapping: set[Tensor] = set()
    places = []
    for number, part in enumerate(map(local, weights)):
        extent = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride()))
        # Storages on a CPU may overlap, as numpy's do. On other devices, an address may be a mere handle.
        storage = 0 if part.device.type == "cpu" else part.untyped_storage().data_ptr()
        begin = part.data_ptr()  # 0 on the meta device, where there is no memory
        end = begin + extent * part.element_size() if begin else 0
        places.append((str(part.device), storage, begin, end, number))
    reach: dict[tuple, tuple[int, int]] = {}
    for *space, begin, end, number in sorted(places):
        last_end, last = reach.get(tuple(space), (0, number))
        if begin < last_end:
            overlapping |= {weights[last], weights[number]}
        reach[tuple(space)] = max((last_end, last), (end, number))
    return overlapping
