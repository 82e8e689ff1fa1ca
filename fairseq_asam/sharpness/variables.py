"""The variables that a function reads, and whether the loop around it has changed them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dis import get_instructions
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

#: What has a variable: a cell of a closure, or the globals of a module.
Holder = Union[types.CellType, "dict[str, Any]"]

_ABSENT = object()
# Values of these types are compared. Others are the same if they are one object.
_PLAIN = (bool, int, float, complex, str, bytes, range, torch.device, torch.Size)


_ARGUMENT = "an argument"


class Run(NamedTuple):
    """A run of a function: its number and the variables that it has read."""

    number: int
    variables: set[tuple[int, str]]


class Variables:
    """Tells whether a function that has run would read other values if it ran again.

    A function that a loop defines reads the loop's variables when it runs. Once the loop has gone on, they
    are those of another turn. Only what changes between two runs counts: what functions rebind themselves,
    and the tensors that they change in place, are their own affair.
    """

    def __init__(self) -> None:
        # By identity: the variable, the value that it had when the last run ended, and that tensor's version.
        self._found: dict[tuple[int, str], tuple[Holder, Any, int]] = {}
        # The number of runs before the last change from outside.
        self._changed: dict[tuple[int, str], int] = {}
        self._runs = 0

    def before_run(self) -> None:
        """Look what has changed since the last run. Call this before the next one."""
        for (identity, name), (holder, value, version) in self._found.items():
            now = _value(holder, name)
            if not _is_same(now, value) or _version(now) != version:
                self._changed[identity, name] = self._runs

    def after_run(self, function: Callable, arguments: tuple) -> Run:
        """Remember what *function*, which has just run with *arguments*, has read."""
        self._runs += 1
        read = {(id(holder), name): holder for holder, name in _read_by(function)}
        read.update({(id(tensor), _ARGUMENT): {_ARGUMENT: tensor} for tensor in _tensors_of(arguments)})
        holders = {**{key: holder for key, (holder, _, _) in self._found.items()}, **read}
        for key, holder in holders.items():
            value = _value(holder, key[1])
            self._found[key] = holder, value, _version(value)
        return Run(self._runs, set(read))

    def changed_since(self, run: Run) -> list[str]:
        """Return the names of the variables that the function of *run* would find changed."""
        return sorted({key[1] for key in run.variables if self._changed.get(key, 0) >= run.number})


def _read_by(function: Any) -> Iterator[tuple[Holder, str]]:
    """Yield the variables that *function* reads and does not write, and those of the functions in them.

    Functions of other modules are left alone, unless a closure has them.
    """
    reads: dict[tuple[int, str], Holder] = {}
    writes: set[tuple[int, str]] = set()
    seen, waiting = set(), [function]
    while waiting:
        each = waiting.pop()
        if isinstance(each, functools.partial):
            waiting += [each.func, *each.args, *each.keywords.values()]
        each = getattr(each, "__func__", each)
        if not isinstance(each, types.FunctionType) or each in seen:
            continue
        seen.add(each)
        names_read, names_written = _global_names(each.__code__)
        holders: list[tuple[str, Holder]] = [*zip(each.__code__.co_freevars, each.__closure__ or ())]
        holders += [(name, each.__globals__) for name in names_read if name in each.__globals__]
        for name, holder in holders:
            reads[id(holder), name] = holder
            value = _value(holder, name)
            if holder is not each.__globals__ or getattr(value, "__globals__", None) is holder:
                waiting.append(value)
            if name in names_written:
                writes.add((id(holder), name))
    return ((holder, key[1]) for key, holder in reads.items() if key not in writes)


@functools.lru_cache(maxsize=256)
def _global_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the globals that *code* and code within it read, and the globals and cells that it writes."""
    read, written = set(), set()
    for instruction in get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            read.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"):
            written.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _global_names(constant)
            read |= inner[0]
            written |= inner[1]
    return frozenset(read), frozenset(written)


def _value(holder: Holder, name: str) -> Any:
    if isinstance(holder, dict):
        return holder.get(name, _ABSENT)
    try:
        return holder.cell_contents
    except ValueError:  # an empty cell
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
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _tensors_of(arguments: Any) -> Iterator[Tensor]:
    """Yield the tensors in *arguments*, in tuples, lists and dictionaries too."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (tuple, list, dict)):
        for each in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from _tensors_of(each)
