"""What a forward pass changes in modules: buffers, as the statistics of batch normalization, and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy


class Moving:
    """Which weights a forward pass changes, as a momentum encoder or data-dependent initialization does.

    Most stand still, and frozen ones can be large, so they are not copied in each update. A version counter
    tells that a pass has changed a weight. It tells neither what the weight was before, nor of a change
    through ``.data``. So a weight is copied, and compared, in the first update that knows it. Later updates
    copy the frozen weights that moved then.

    Args:
        perturbed: weights that a perturbation moves and restores.
    """

    def __init__(self, perturbed: Iterable[Tensor]):
        self.perturbed = frozenset(perturbed)
        # The copies take no more memory than those that the perturbation makes after them.
        self.room = sum(weight.nbytes for weight in self.perturbed if not is_lazy(weight))
        self.moves: dict[Tensor, bool] = {}

    def are_restored(self, weight: Tensor) -> bool:
        """Return whether the perturbation restores *weight* after its pass."""
        return weight.requires_grad and weight in self.perturbed

    def keep(self, weights: Collection[Tensor]) -> None:
        """Forget all but *weights*."""
        if len(self.moves) > len(weights):
            self.moves = {weight: moves for weight, moves in self.moves.items() if weight in weights}


class _Watched(NamedTuple):
    """A weight that a forward pass may change, with a copy to restore it or to compare it with."""

    weight: Tensor
    module: nn.Module
    copy: Tensor | None


class ModuleState:
    """A snapshot of what a forward pass may change in modules.

    These are the buffers, and the weights that no perturbation restores. A pass may also set trained
    weights, from the first batch. It then computed the loss of the weights that it set, so they are w, and
    the buffers of their module are not restored: they say that the weights are set.

    Args:
        modules: those that are saved as they are now, submodules too.
        moving: what is known of their weights. ``None``: save buffers alone.

    Attributes:
        modules: all modules that are saved, submodules too.
        weights: their weights.
    """

    def __init__(self, modules: Iterable[nn.Module] = (), moving: Moving | None = None):
        self.modules: set[nn.Module] = set()
        self.weights: dict[Tensor, None] = {}
        self._moving = moving
        self._room = 0 if moving is None else moving.room
        self._buffers: list[tuple[nn.Module, dict[str, tuple[Tensor | None, Tensor | None]]]] = []
        self._watched: list[_Watched] = []
        self._stamps: list[tuple[int, int]] = []  # of the weights watched, before the present pass
        self._changed: set[int] = set()  # their indices
        for module in modules:
            self.add(module)

    @torch.no_grad()
    def add(self, module: nn.Module) -> list[Tensor]:
        """Save *module* too, as it is now, unless it is saved already. Return its weights that are new."""
        if module in self.modules:
            return []
        new: list[Tensor] = []
        for part in module.modules():
            if part in self.modules:
                continue
            self.modules.add(part)
            self._buffers.append((part, _buffers(part)))
            for weight in part._parameters.values():
                if weight is not None and weight not in self.weights:
                    self.weights[weight] = None
                    new.append(weight)
                    if self._moving is not None:
                        self._watch(weight, part, self._moving)
        return new

    def _watch(self, weight: Tensor, module: nn.Module, moving: Moving) -> None:
        is_trained = moving.are_restored(weight)
        # What a forward pass makes of a trained weight is w, unless buffers tell of it.
        if type(weight) not in (Tensor, nn.Parameter) or (is_trained and not module._buffers):
            return
        if weight.is_inference():
            return
        moves, copy = moving.moves.get(weight), None
        if moves is None and weight.device.type != "meta" and weight.nbytes <= self._room:
            self._room -= weight.nbytes
            copy = weight.detach().clone()
        elif moves and not weight.requires_grad:
            copy = weight.detach().clone()
        self._watched.append(_Watched(weight, module, copy))
        self._stamps.append(_stamp(weight))

    @torch.no_grad()
    def now(self) -> ModuleState:
        """Return a snapshot of what a pass at w + epsilon may change, as it is now."""
        state = ModuleState()
        state._buffers = [(part, _buffers(part)) for part in self.modules]
        for index, (weight, module, copy) in enumerate(self._watched):
            restored = self._moving is not None and self._moving.are_restored(weight)
            if not restored and (index in self._changed or copy is not None):
                state._watched.append(_Watched(weight, module, weight.detach().clone()))
        return state

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers and weights: the same tensors, with the values that they had."""
        initialized = {
            self._watched[i].module for i in self._changed if self._watched[i].weight.requires_grad
        }
        for module, saved in self._buffers:
            if module in initialized:
                continue
            for name in set(module._buffers.keys()) - saved.keys():
                del module._buffers[name]
            for name, (buffer, copy) in saved.items():
                if buffer is not None and copy is not None:
                    _put(buffer, copy)
                if name not in module._buffers or module._buffers[name] is not buffer:
                    module._buffers[name] = buffer
        for weight, _, copy in self._watched:
            if copy is not None:
                _put(weight, copy)

    def begin_pass(self) -> None:
        """Remember how the weights are before a pass."""
        self._stamps = [_stamp(watched.weight) for watched in self._watched]

    def end_pass_at_w(self) -> None:
        """Find out which weights the pass at w has changed.

        Raises:
            RuntimeError: it has changed a frozen weight that was not copied.
        """
        moving, lost = self._moving, []
        for index, (weight, module, copy) in enumerate(self._watched):
            changed = _stamp(weight) != self._stamps[index]
            if weight not in moving.moves:
                changed = changed or (copy is not None and not _same(weight, copy))
                moving.moves[weight] = changed
                if weight.requires_grad or not changed:
                    self._watched[index] = _Watched(weight, module, None)
            if changed:
                self._changed.add(index)
                if not weight.requires_grad and copy is None:
                    moving.moves[weight] = True
                    lost.append(_name(module, weight))
        if lost:
            raise RuntimeError(
                f"the pass at w changed frozen weights ({', '.join(lost)}) of which no copy was made, so "
                "that the pass at w + epsilon cannot begin from the same ones: register them as buffers"
            )

    def end_passes_at_w_plus_epsilon(self) -> None:
        """Check that no weight has changed that is not restored.

        Raises:
            RuntimeError: one has.
        """
        changed = [
            _name(module, weight)
            for index, (weight, module, copy) in enumerate(self._watched)
            if index not in self._changed
            and copy is None
            and not self._moving.are_restored(weight)
            and _stamp(weight) != self._stamps[index]
        ]
        if changed:
            raise RuntimeError(
                f"the pass at w + epsilon changed weights ({', '.join(changed)}) that the pass at w did not "
                "change: let both passes do the same, or register the weights as buffers"
            )

    @contextlib.contextmanager
    def adding_what_runs(self, found: Callable[[list[Tensor]], None]) -> Iterator[None]:
        """Within the block, save every module before it runs, and call *found* with weights that are new.

        A module within a compiled one (``torch.compile``) is saved with that. A module that is compiled in
        place (``module.compile()``) is missed.
        """

        def add(module: nn.Module, inputs: object) -> None:
            if not is_compiling():
                found(self.add(module))

        handle = register_module_forward_pre_hook(add)
        try:
            yield
        finally:
            handle.remove()


def _buffers(module: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Return the buffers of *module* itself, each with a copy of its values.

    There is no copy of a lazy buffer, which has no values before the first forward pass, nor of one that was
    made in inference mode and cannot change outside of it.
    """
    buffers: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for name, buffer in module._buffers.items():
        fixed = buffer is None or is_lazy(buffer) or buffer.is_inference()
        buffers[name] = buffer, None if fixed else buffer.clone()
    return buffers


def _put(tensor: Tensor, values: Tensor) -> None:
    if tensor.shape == values.shape and tensor.dtype == values.dtype:
        tensor.copy_(values)
    else:
        tensor.data = values.clone()


def _stamp(weight: Tensor) -> tuple[int, int]:
    """Return what changes when something writes into *weight* or gives it other memory."""
    return weight._version, weight.data_ptr()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _name(module: nn.Module, weight: Tensor) -> str:
    name = next(name for name, each in module._parameters.items() if each is weight)
    return f"{name} of {type(module).__name__}"
