"""Weights in shards (``DTensor``, as with ``fully_shard`` and tensor parallelism).

Each process perturbs its own part of a weight. From the other processes it only needs sums: of the powers of
T g for the norm, and of squared weights for an operator that takes norms across shards.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .normalization import NormalizationOperator

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeGuard


_WHOLE = {Tensor, nn.Parameter}


class Shards(NamedTuple):
    """The processes that share a weight: those along *dims* of the device *mesh*."""

    mesh: Any
    dims: tuple[int, ...]

    def all_reduce(self, values: Tensor, operation: str = "SUM") -> None:
        """Reduce *values* in place over these processes.

        Raises:
            RuntimeError: their process group is gone.
        """
        distributed = torch.distributed
        for dim in self.dims:
            try:
                group = self.mesh.get_group(dim)
                size = distributed.get_world_size(group)
            except (RuntimeError, ValueError, KeyError, AssertionError) as error:
                raise RuntimeError(
                    f"the process group of the weights' device mesh {self.mesh} is gone: make the update "
                    "before destroy_process_group()"
                ) from error
            if size > 1:
                distributed.all_reduce(values, getattr(distributed.ReduceOp, operation), group)

    def size(self) -> int:
        """Return the number of processes."""
        return math.prod(self.mesh.size(dim) for dim in self.dims)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether *tensor* is a ``DTensor``, of which this process has one part."""
    # Look for its name: importing the class takes seconds, and older versions of torch keep it elsewhere.
    kind = type(tensor)
    return kind not in _WHOLE and any(base.__name__ == "DTensor" for base in kind.__mro__)


def are_whole(tensors: Iterable[Tensor]) -> bool:
    """Return whether all *tensors* are of torch's own types, which have no shards."""
    return _WHOLE.issuperset(map(type, tensors))


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of *tensor*, in the same memory. A whole tensor is returned as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def part_of(whole: Tensor, weight: Tensor) -> Tensor:
    """Return this process's part of *whole*, a tensor in the shape of *weight*.

    Every process must have the same *whole*. Nothing is sent.
    """
    if not is_sharded(weight):
        return whole
    replicas = type(weight).from_local(whole, weight.device_mesh, run_check=False)
    # Clone the part, or it would keep the whole in memory.
    return replicas.redistribute(placements=weight.placements).to_local().clone()


def shards_of(weight: Tensor, tensor_dims: Iterable[int] | None = None) -> Shards | None:
    """Return the processes that share *weight*, along *tensor_dims* if given; ``None`` if there are none."""
    if not is_sharded(weight):
        return None
    along = [getattr(placement, "dim", None) for placement in weight.placements]  # replicas have none
    wanted = set(range(weight.dim()) if tensor_dims is None else tensor_dims)
    dims = tuple(i for i, dim in enumerate(along) if dim in wanted)
    return Shards(weight.device_mesh, dims) if dims else None


def local_gradient(gradient: Tensor, weight: Tensor, name: str) -> Tensor:
    """Return this process's part of *gradient*, that of *weight*.

    Raises:
        ValueError: the gradient is whole and the weight in shards, or the other way round.
    """
    if not is_sharded(weight) and not is_sharded(gradient):
        return gradient
    if is_sharded(weight) and is_sharded(gradient):
        if gradient.placements != weight.placements:
            gradient = gradient.redistribute(placements=weight.placements)
        return gradient.to_local()
    kinds = ("in shards", "whole")[:: 1 if is_sharded(weight) else -1]
    raise ValueError(
        f"{name} is {kinds[0]}, but its gradient is {kinds[1]}: let backward() make the gradient, and "
        "call reshard() on the module after a forward pass without a backward"
    )


def norm_over(shards: Shards | None, norms: list[Tensor], order: float) -> Tensor:
    """Return the norm of several vectors together, from the norms of this process's part of each.

    *shards* are the processes that share them; ``None`` if this process has all of them.
    """
    norm = norms[0]
    if len(norms) > 1:
        norm = torch.linalg.vector_norm(torch.stack([each.to(norm) for each in norms]), order)
    if shards is None:
        return norm
    total = norm.double() if math.isinf(order) else norm.double().pow(order)
    shards.all_reduce(total, "MAX" if math.isinf(order) else "SUM")
    return (total if math.isinf(order) else total.pow(1.0 / order)).to(norm)


def diagonals_over_shards(operators: dict[Tensor, NormalizationOperator], eta: float) -> dict[Tensor, Tensor]:
    """Return the diagonal of T for the weights whose T is a norm over several processes.

    All these processes must call this for the same weights, even if their own part is empty. There is one
    reduction for all weights that are shared alike.

    Args:
        operators: the operator of each weight. Whole weights are left out.
        eta: stability term.
    """
    groups: dict[Shards, list[Tensor]] = {}
    for weight, operator in operators.items():
        shards = shards_of(weight, operator.norm_dims(weight))
        if shards is not None:
            groups.setdefault(shards, []).append(weight)
    diagonals = {}
    for shards, weights in groups.items():
        parts = [operators[w].diagonal([local(w).detach()], 0.0)[0].double() for w in weights]
        squares = torch.cat([part.flatten() for part in parts]).square_()
        shards.all_reduce(squares)
        for weight, part, norm in zip(
            weights, parts, squares.sqrt_().split([part.numel() for part in parts])
        ):
            working_dtype = torch.promote_types(weight.dtype, torch.float32)
            diagonals[weight] = (norm.view_as(part) + eta).to(working_dtype)
    return diagonals


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free the whole weights that ``fully_shard`` has gathered.

    It would use them in the next pass, although the shards have changed.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    for each in modules if hasattr(module, "FSDPModule") else ():
        if isinstance(each, module.FSDPModule):
            each.reshard()


class SameWeightsCheck:
    """Checks that all processes have gradients of the same weights.

    Otherwise they would add up norms of different weights. The check costs no message of its own: each
    process adds a fingerprint to the sum of the norms.
    """

    def __init__(self):
        self._present: list[str] | None = None
        self._fingerprint: Tensor | None = None
        self._look = True

    def fingerprint(self, present: list[str], device: torch.device) -> Tensor:
        """Return two numbers that identify the names *present*, to be summed over processes."""
        self._look = present != self._present or device.type == "cpu"
        if present != self._present or self._fingerprint is None or self._fingerprint.device != device:
            number = hash_of(present)
            self._fingerprint = torch.tensor([number, number**2], dtype=torch.float64, device=device)
            self._present = list(present)
        return self._fingerprint

    def check(self, total: Tensor, processes: int) -> None:
        """Check the sum of the two numbers over all *processes*.

        Reading it stalls an accelerator. There it is only read after this process has got gradients of other
        weights than before.

        Raises:
            RuntimeError: the processes have gradients of different weights.
        """
        if not self._look:
            return
        first, second = total.tolist()
        # n sum x_i^2 = (sum x_i)^2 only if all x_i are the same.
        if processes * second != first**2:
            raise RuntimeError(
                "the processes that share out the weights have gradients of different weights "
                f"(this one: {', '.join(self._present) or 'none'}): make the same backward pass on each"
            )


def hash_of(names: list[str]) -> int:
    """Return a number below 2^16 for *names*, the same on every process.

    It is small, so that the sum of its square over many processes is exact in float64.
    """
    number = 1
    for character in "\n".join(names).encode():
        number = (number * 31 + character) % 65521
    return number
