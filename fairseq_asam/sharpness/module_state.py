"""What a forward pass changes in modules: buffers, such as batch-normalization statistics, and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

_PLAIN = (Tensor, nn.Parameter)
#: What a module may keep about its buffers in an attribute.
_NOTES = (bool, int, float, str, type(None), Tensor)


class Moving:
    """Which weights a forward pass changes, as a momentum encoder or data-dependent initialization does.

    Most stand still, and frozen ones can be large, so they are not copied in each update. A version counter
    tells that a pass has changed a weight. It does not tell what the weight was before, and it misses a
    change through ``.data``. So a weight is copied, and compared, in the first update that knows it. Later
    updates copy the frozen weights that moved then.

    Args:
        perturbed: weights that a perturbation moves and restores.
    """

    def __init__(self, perturbed: Iterable[Tensor]):
        self.perturbed = frozenset(perturbed)
        # The copies take no more memory than those that the perturbation makes after them.
        self.room = sum(w.nbytes for w in self.perturbed if w.requires_grad and not is_lazy(w))
        self.moves: dict[Tensor, bool] = {}

    def is_perturbed(self, weight: Tensor) -> bool:
        """Return whether the perturbation would move and restore *weight* as it is now."""
        return weight.requires_grad and weight in self.perturbed

    def keep(self, weights: Collection[Tensor]) -> None:
        """Forget all but *weights*."""
        if len(self.moves) > len(weights):
            self.moves = {weight: moves for weight, moves in self.moves.items() if weight in weights}


class _Watched:
    """A weight that a forward pass may change.

    Attributes:
        copy: of its values, to restore them or to compare them with. ``None``: its stamp alone is watched.
        restored: whether the perturbation restores it.
        settled: whether it is known to move or to stand still.
        changed: whether a pass at w has changed it.
        initialized: whether what the pass at w made of it is w.
    """

    __slots__ = ("changed", "copy", "initialized", "module", "restored", "settled", "stamp", "weight")

    def __init__(self, weight: Tensor, module: nn.Module, restored: bool, settled: bool):
        self.weight, self.module, self.restored, self.settled = weight, module, restored, settled
        self.copy: Tensor | None = None
        self.changed = self.initialized = False
        self.stamp = _stamp(weight)


class ModuleState:
    """A snapshot of what a forward pass may change in modules.

    These are the buffers, and the weights that no perturbation restores. A pass may also set trained
    weights, from the first batch. The loss is then that of the weights that it set, so these are w. What says
    that they are set is not restored: the buffers of their module, and flags that went up.

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
        self._buffers: dict[nn.Module, dict[str, tuple[Tensor | None, Tensor | None]]] = {}
        # Where a pass replaces a buffer, an attribute may say so, such as the length that a table is for.
        self._notes: dict[nn.Module, dict[str, object]] = {}
        self._watched: list[_Watched] = []
        # What a forward pass makes of the other weights is w. It matters to flags elsewhere that it has.
        self._others: list[tuple[Tensor, int]] = []
        self._initialized = False  # whether a pass at w has set trained weights for the first time
        for module in modules:
            self.add(module)

    @torch.no_grad()
    def add(self, module: nn.Module) -> list[Tensor]:
        """Save *module* too, as it is now, unless it is saved already. Return its weights that are new."""
        if module in self.modules:
            return []
        moving, weights, before = self._moving, self.weights, len(self.weights)
        to_watch: list[tuple[Tensor, nn.Module, bool]] = []
        for part in module.modules():
            if part in self.modules:
                continue
            self.modules.add(part)
            has_buffers = bool(part._buffers)
            if has_buffers:
                self._buffers[part], self._notes[part] = _buffers(part), _notes(part)
            for weight in part._parameters.values():
                if weight is None or weight in weights:
                    continue
                weights[weight] = None
                # Lazy weights, shards and other kinds have no such counters or change in ways of their own.
                plain = (
                    type(weight) in _PLAIN and weight.layout == torch.strided and not weight.is_inference()
                )
                if moving is not None and plain:
                    restored = moving.is_perturbed(weight)
                    if has_buffers or not restored:
                        to_watch.append((weight, part, restored))
                    else:
                        self._others.append((weight, weight._version))
        # Frozen weights first: of these, a copy is needed.
        for each in sorted(to_watch, key=lambda each: each[2]):
            self._watch(*each)
        return list(weights)[before:]

    def _watch(self, weight: Tensor, module: nn.Module, restored: bool) -> None:
        moves = self._moving.moves.get(weight)
        watched = _Watched(weight, module, restored, settled=moves is not None)
        writable = _is_writable(weight)
        if moves is None and weight.device.type != "meta" and weight.nbytes <= self._room and writable:
            self._room -= weight.nbytes
            watched.copy = weight.detach().clone()
        elif moves and not restored and writable:
            watched.copy = weight.detach().clone()
        self._watched.append(watched)

    @torch.no_grad()
    def now(self) -> ModuleState:
        """Return a snapshot of what a pass at w + epsilon may change, as it is now."""
        state = ModuleState()
        state.modules = self.modules
        state._buffers = {part: _buffers(part) for part in self.modules if part._buffers}
        state._notes = {part: _notes(part) for part in state._buffers}
        for watched in self._watched:
            if not watched.restored and (watched.changed or watched.copy is not None):
                as_now = _Watched(watched.weight, watched.module, False, True)
                as_now.copy = watched.weight.detach().clone()
                state._watched.append(as_now)
        return state

    def restore(self) -> None:
        """Restore the buffers and weights: the same tensors, with the values that they had."""
        try:
            self._restore()
        except BaseException:  # such as a KeyboardInterrupt half way: restore the rest
            self._restore()
            raise

    @torch.no_grad()
    def _restore(self) -> None:
        initialized = {each.module for each in self._watched if each.initialized}
        for module in self.modules:
            saved = self._buffers.get(module)
            if (saved is None and not module._buffers) or module in initialized:
                continue
            saved, now = saved or {}, dict(module._buffers.items())
            replaced = now.keys() != saved.keys() or any(now[name] is not saved[name][0] for name in now)
            if replaced and module in self._notes and not self._initialized:
                for name in _notes(module).keys() - self._notes[module].keys():
                    del module.__dict__[name]
                module.__dict__.update(self._notes[module])
            for name in now.keys() - saved.keys():
                del module._buffers[name]
            for name, (buffer, copy) in saved.items():
                if self._initialized and _went_up(copy, now.get(name)):
                    continue
                if buffer is not None and copy is not None:
                    _put(buffer, copy)
                if name not in now or now[name] is not buffer:
                    module._buffers[name] = buffer
        for watched in self._watched:
            if watched.copy is not None:
                _put(watched.weight, watched.copy)

    def end_pass_at_w(self) -> None:
        """Find out which weights the pass at w has changed.

        Raises:
            RuntimeError: it has changed a frozen weight that was not copied.
        """
        lost, moves = [], self._moving.moves
        changes = [_has_changed(watched) for watched in self._watched]
        # What follows trained weights may begin as their equal, and seem to stand still in its first update.
        follows = any(
            changed and not watched.weight.requires_grad for changed, watched in zip(changes, self._watched)
        )
        for watched, changed in zip(self._watched, changes):
            weight = watched.weight
            watched.stamp = _stamp(weight)
            if not watched.settled:
                watched.settled = True
                if weight.requires_grad or not (changed or follows):
                    watched.copy = None
            # The pass may unfreeze weights, as a switch of adapters does.
            watched.restored = self._moving.is_perturbed(weight)
            if watched.restored:
                watched.copy = None
            moved_before = moves.setdefault(weight, watched.copy is not None)
            if changed:
                moves[weight] = watched.changed = True
                # A trained weight that moves for the first time may have been initialized.
                watched.initialized = weight.requires_grad and watched.copy is None
                if weight.requires_grad:
                    self._initialized |= not moved_before
                elif watched.copy is None:
                    lost.append(_name(watched))
        for weight, version in self._others:
            if weight._version != version and not moves.get(weight):
                moves[weight] = self._initialized = True
        if any(
            getattr(weight, "_post_accumulate_grad_hooks", None) for weight, moved in moves.items() if moved
        ):
            raise RuntimeError(
                "the pass at w changed a weight that has a hook on its gradient, as an optimizer within "
                "backward() would: step after both passes"
            )
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
        lost = [
            _name(each)
            for each in self._watched
            if not (each.restored or each.changed or each.copy is not None)
            and _stamp(each.weight) != each.stamp
        ]
        if lost:
            raise RuntimeError(
                f"the pass at w + epsilon changed weights ({', '.join(lost)}) that the pass at w did not "
                "change: let both passes do the same, or register the weights as buffers"
            )

    def restores(self, tensor: Tensor) -> bool:
        """Return whether *tensor* is a weight or a buffer that is saved."""
        return isinstance(tensor, Tensor) and (
            tensor in self.weights
            or any(tensor is buffer for buffers in self._buffers.values() for buffer, _ in buffers.values())
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

    There is no copy of a lazy buffer, which has no values before the first forward pass, nor of one that
    cannot change in place: it was made in inference mode, is nested, or is expanded.
    """
    buffers: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for name, buffer in module._buffers.items():
        fixed = buffer is None or is_lazy(buffer) or buffer.is_inference() or not _is_writable(buffer)
        buffers[name] = buffer, None if fixed else buffer.clone()
    return buffers


def _notes(module: nn.Module) -> dict[str, object]:
    """Return the numbers, texts and tensors in the attributes of *module*, not their copies."""
    return {name: value for name, value in vars(module).items() if isinstance(value, _NOTES)}


def _has_changed(watched: _Watched) -> bool:
    """Return whether a pass has changed a weight; only of one that is not settled, its values tell too."""
    changed = _stamp(watched.weight) != watched.stamp
    may_tell = not (changed or watched.settled or watched.copy is None)
    return changed or (may_tell and not _same(watched.weight, watched.copy))


def _is_writable(tensor: Tensor) -> bool:
    """Return whether a copy can be written into *tensor*: it is neither nested nor expanded."""
    if tensor.is_nested:
        return False
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    return not any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, strides))


def _put(tensor: Tensor, values: Tensor) -> None:
    if tensor.shape == values.shape and tensor.dtype == values.dtype:
        tensor.copy_(values)
    else:
        tensor.data = values.clone()


def _went_up(before: Tensor | None, now: Tensor | None) -> bool:
    """Return whether a buffer is a flag, a single number, that was 0 and is not any more."""
    if before is None or now is None or not before.numel() == now.numel() == 1:
        return False
    return not before.any() and bool(now.any())


def _stamp(weight: Tensor) -> tuple[int, int]:
    """Return what changes when something writes into *weight* or gives it other memory."""
    return weight._version, weight.data_ptr()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:  # torch crashes in torch.equal() of a view of one
        tensor = tensor.int_repr()
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)


def _name(watched: _Watched) -> str:
    name = next(name for name, each in watched.module._parameters.items() if each is watched.weight)
    return f"{name} of {type(watched.module).__name__}"
