"""The variables that a function reads, and whether the loop around it has changed them."""

from __future__ import annotations

import functools
import io
import itertools
import types
from collections.abc import Callable, Iterator
from dis import get_instructions
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

#: What has a variable: a cell of a closure, globals, attributes of an object, or a container of arguments.
Holder = Union[types.CellType, "dict[Any, Any]", "list[Any]", "tuple[Any, ...]"]

_ABSENT = object()
# Values of these types are compared. Others are the same if they are one object.
_PLAIN = (bool, int, float, complex, str, bytes, range, torch.device, torch.Size)
# Longer containers of arguments are not looked into.
_LONG = 1000


class Run(NamedTuple):
    """A run of a function.

    Attributes:
        read: what has the variables that it reads, by identity and name.
        modules: those in the variables.
        weights: leaves of graphs in the variables, which get a gradient.
        versions: of the tensors in its arguments before the run.
    """

    read: dict[tuple[int, Any], Holder]
    modules: list[nn.Module]
    weights: list[Tensor]
    versions: list[tuple[Tensor, int]]


class Variables:
    """Tells whether functions that have run would read other values if they ran again.

    A function that a loop defines reads the loop's variables when it runs. Once the loop has gone on, they
    are those of another turn. What functions rebind themselves is their own affair.

    Attributes:
        changed: the names of what was changed after a run that had read it, and outside of any run.
    """

    def __init__(self) -> None:
        self.changed: set[str] = set()
        # For each variable, the value that it had when the last run ended, and the version of that tensor.
        self._found: dict[tuple[int, Any], tuple[Holder, Any, int]] = {}

    def look(self) -> None:
        """Look what has changed since the last run. Call this before the next one."""
        for (_, name), (holder, value, version) in self._found.items():
            now = _value(holder, name)
            if not _is_same(now, value) or _version(now) != version:
                self.changed.add(name if isinstance(name, str) else "an argument")

    def begin_run(self, function: Callable, arguments: tuple) -> Run:
        """Look what *function* reads, which is about to run with *arguments*.

        Raises:
            RuntimeError: it reads an iterator.
        """
        self.look()
        of_arguments = list(_elements(arguments))
        read = {(id(holder), name): holder for holder, name in (*_read_by(function), *of_arguments)}
        values = [_value(holder, name) for (_, name), holder in read.items()]
        for (_, name), value in zip(read, values):
            if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
                raise RuntimeError(
                    f"the function reads the iterator {name}, and each pass would take other values from it: "
                    "take the batch from the iterator first, and pass it on, as in at_w(function, batch)"
                )
        modules = [value for value in values if isinstance(value, nn.Module)]
        weights = [v for v in values if isinstance(v, Tensor) and v.requires_grad and v.is_leaf]
        tensors = [value for value in itertools.starmap(_value, of_arguments) if isinstance(value, Tensor)]
        return Run(read, modules, weights, [(tensor, _version(tensor)) for tensor in tensors])

    def end_run(self, run: Run) -> None:
        """Look what the variables are after *run*.

        Raises:
            RuntimeError: it has changed an argument in place. A tensor with one element may be for counting.
        """
        for tensor, version in run.versions:
            if _version(tensor) != version and tensor.numel() > 1:
                raise RuntimeError(
                    f"the pass at w changed an argument of shape {tuple(tensor.shape)} in place, and the "
                    "pass at w + epsilon would be over another batch: let the function change a copy of it"
                )
        holders = {**{key: holder for key, (holder, _, _) in self._found.items()}, **run.read}
        for key, holder in holders.items():
            value = _value(holder, key[1])
            self._found[key] = holder, value, _version(value)


class _Names(NamedTuple):
    """The names in a function's code, and in functions within it."""

    globals: frozenset[str]
    attributes: frozenset[str]
    written: frozenset[str]


def _read_by(function: Any) -> Iterator[tuple[Holder, Any]]:
    """Yield what *function* reads and does not write: variables, and attributes of the objects in them.

    Functions in its closure, its module and its object are looked into too.
    """
    reads: dict[tuple[int, Any], Holder] = {}
    written: set[tuple[int, str]] = set()
    seen, waiting = set(), [function, function.__call__]
    while waiting:
        each = waiting.pop()
        if isinstance(each, functools.partial):
            waiting += [each.func, *each.args, *each.keywords.values()]
            reads.update(
                {(id(holder), name): holder for holder, name in _elements((each.args, each.keywords))}
            )
        owner = None
        if isinstance(each, types.MethodType):
            owner, each = each.__self__, each.__func__
        if not isinstance(each, types.FunctionType) or (each, id(owner)) in seen:
            continue
        seen.add((each, id(owner)))
        names, own = _names(each.__code__), each.__globals__
        cells = each.__closure__ or ()
        found: list[tuple[Holder, str]] = [*zip(cells, each.__code__.co_freevars)]
        found += [(own, name) for name in names.globals if name in own]
        values = [_value(*variable) for variable in found]
        for attributes in map(_attributes, [owner, *values]):
            found += [(attributes, name) for name in names.attributes & attributes.keys()]
        methods = [getattr(type(owner), name, None) for name in names.attributes]
        waiting += values[: len(cells)]
        waiting += [value for value in values[len(cells) :] if _globals_of(value) is own]
        waiting += [types.MethodType(method, owner) for method in methods if _globals_of(method) is own]
        reads.update({(id(holder), name): holder for holder, name in found})
        written.update((id(holder), name) for holder, name in found if name in names.written)
    return ((holder, key[1]) for key, holder in reads.items() if key not in written)


@functools.lru_cache(maxsize=256)
def _names(code: types.CodeType) -> _Names:
    read: dict[str, set[str]] = {"GLOBAL": set(), "ATTR": set(), "METHOD": set()}
    written = set()
    for instruction in get_instructions(code):
        action, _, kind = instruction.opname.partition("_")
        if action == "LOAD" and kind in read:
            read[kind].add(instruction.argval)
        elif action in ("STORE", "DELETE") and kind in ("GLOBAL", "DEREF", "ATTR"):
            written.add(instruction.argval)
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return _Names(
        frozenset(read["GLOBAL"].union(*(names.globals for names in inner))),
        frozenset(read["ATTR"].union(read["METHOD"], *(names.attributes for names in inner))),
        frozenset(written.union(*(names.written for names in inner))),
    )


def _globals_of(value: Any) -> dict[str, Any] | None:
    return value.__globals__ if isinstance(value, types.FunctionType) else None


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object; none of a module of Python, a class, a function or a tensor."""
    if isinstance(value, (types.ModuleType, type, types.FunctionType, Tensor)):
        return {}
    return getattr(value, "__dict__", {})


def _elements(container: Any) -> Iterator[tuple[Holder, Any]]:
    """Yield where the elements of *container* are, and those of the containers within it."""
    if isinstance(container, (tuple, list, dict)) and len(container) < _LONG:
        for name in container if isinstance(container, dict) else range(len(container)):
            yield container, name
            yield from _elements(container[name])


def _value(holder: Holder, name: Any) -> Any:
    try:
        return holder.cell_contents if isinstance(holder, types.CellType) else holder[name]
    except (ValueError, LookupError):  # an empty cell, or no such name
        return _ABSENT


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):  # defined in each turn
        return a.__code__ is b.__code__ and _parts(a) == _parts(b)
    return type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b)


def _parts(function: types.FunctionType) -> list[int]:
    return [id(part) for part in (*(function.__closure__ or ()), *(function.__defaults__ or ()))]


def _version(value: Any) -> int:
    if not isinstance(value, Tensor) or is_lazy(value) or value.is_inference():
        return 0
    return value._version
