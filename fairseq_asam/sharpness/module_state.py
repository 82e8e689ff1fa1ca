"""The buffers that a forward pass changes, such as the statistics of batch normalization."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy


class ModuleState:
    """A snapshot of the buffers of modules.

    Args:
        modules: those whose buffers, and whose submodules' buffers, are saved as they are now.

    Attributes:
        modules: all of these, submodules too.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()):
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self.modules: set[nn.Module] = set()
        for module in modules:
            self.add(module)

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        """Save the buffers of *module* too, as they are now, unless they are saved already."""
        if module in self.modules:
            return
        for part in module.modules():
            if part not in self.modules:
                self.modules.add(part)
                for name, buffer in part.named_buffers(recurse=False):
                    if not is_lazy(buffer):  # a lazy buffer has no values before the first forward pass
                        self._buffers.append((part, name, buffer, buffer.clone()))

    @torch.no_grad()
    def now(self) -> ModuleState:
        """Return a snapshot of the same buffers as they are now."""
        state = ModuleState()
        for module, name, _, _ in self._buffers:
            buffer = getattr(module, name)
            state._buffers.append((module, name, buffer, buffer.clone()))
        return state

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers: the same tensors, with the values that they had."""
        for module, name, buffer, copy in self._buffers:
            buffer.copy_(copy)
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)

    @contextlib.contextmanager
    def adding_what_runs(self) -> Iterator[None]:
        """Within the block, save the buffers of every module before it runs.

        A module within a compiled one (``torch.compile``) is saved with that. A module that is compiled in
        place (``module.compile()``) is missed.
        """

        def add(module: nn.Module, inputs: object) -> None:
            if not is_compiling():
                self.add(module)

        handle = register_module_forward_pre_hook(add)
        try:
            yield
        finally:
            handle.remove()
