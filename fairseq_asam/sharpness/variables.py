"""The variables that a function reads, and whether the loop around it has changed them."""

from __future__ import annotations

import functools
import io
import operator
import queue
import types
import zlib
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterator
from dis import get_instructions
from itertools import chain
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

#: What has a variable: a cell of a closure, globals, attributes of an object, or a container.
Holder = Union[types.CellType, "dict[Any, Any]", "list[Any]", "tuple[Any, ...]", "deque[Any]"]

_ABSENT = object()
# Values of these types are compared. Others are the same if they are one object.
_PLAIN = (bool, int, float, complex, str, bytes, range, torch.device, torch.Size)
# Longer containers are not looked into, nor is what is deeper in the variables, nor larger arrays of numpy.
_LONG, _DEEP, _LARGE = 1000, 3, 2**24


class Run(NamedTuple):
    """A run of a function.

    Attributes:
        read: what has the variables that it reads, by identity and name.
        found: the values of these before the run, their versions and, of containers, what they held.
        modules: those in the variables.
        weights: leaves of graphs in the variables, which get a gradient.
        containers: those in its arguments, each with what it holds.
        attributes: the tensors in the objects among its arguments.
    """

    read: dict[tuple[int, Any], Holder]
    found: list[tuple[Any, int, Any]]
    modules: list[nn.Module]
    weights: list[Tensor]
    containers: list[tuple[Any, Any]]
    attributes: list[tuple[dict[str, Any], str, Tensor]]

    def restore_arguments(self) -> None:
        """Put back what was in the arguments before the run, whatever it took out or put in."""
        for attributes, name, value in self.attributes:
            attributes[name] = value
        for container, content in self.containers:
            now = _content(container)
            if isinstance(container, list):
                container[:] = content
            elif len(now) != len(content) or any(map(operator.is_not, chain(*now), chain(*content))):
                # By the methods of dict: HuggingFace's outputs refuse update() and pop() of their own.
                mapping = container.data if isinstance(container, UserDict) else container
                (OrderedDict if isinstance(mapping, OrderedDict) else dict).clear(mapping)
                for key, value in content:
                    mapping[key] = value


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
        """Find out what has changed since the last run. Call this before the next one."""
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
        of_containers, of_objects = list(_elements(arguments)), list(_tensors_of_objects(arguments))
        holders = [*_read_by(function), *of_containers, *of_objects]
        read = {(id(holder), name): holder for holder, name in holders}
        values = [_value(holder, name) for (_, name), holder in read.items()]
        for (_, name), value in zip(read, values):
            if _gives_next(_owner(value)):
                raise RuntimeError(
                    f"the function reads the iterator {name}, and each pass would take other values from it: "
                    "take the batch from the iterator first, and pass it on, as in at_w(function, batch)"
                )
        modules = [value for value in values if isinstance(value, nn.Module)]
        weights = [v for v in values if isinstance(v, Tensor) and v.requires_grad and v.is_leaf]
        restored = [(container, _content(container)) for container in _containers(arguments)]
        kept = {id(container) for container, _ in restored}
        found = [(v, _version(v), None if id(v) in kept else _held(v)) for v in values]
        attributes = [(holder, name, _value(holder, name)) for holder, name in of_objects]
        return Run(read, found, modules, weights, restored, attributes)

    def end_run(self, run: Run, restores: Callable[[Tensor], bool] = lambda tensor: False) -> list[Tensor]:
        """Look what the variables are after *run*, and return graphs in them, which were made before the run.

        Args:
            run: made by :meth:`begin_run`.
            restores: whether a tensor is restored before the next run.

        Raises:
            RuntimeError: it has changed what it read in place. A tensor with one element may be for counting.
        """
        graphs = []
        for (key, holder), (value, version, held) in zip(run.read.items(), run.found):
            now = _value(holder, key[1])
            what = key[1] if isinstance(key[1], str) else "an argument"
            if held is not None and _is_part(_held(value), held):
                raise RuntimeError(
                    f"the pass at w took values out of {what}, and the pass at w + epsilon would take "
                    "others: take the batch out first, and pass it on, as in at_w(function, batch)"
                )
            if _version(value) != version and _counts(value) and not restores(value):
                raise RuntimeError(
                    f"the pass at w changed {what} of shape {tuple(value.shape)} in place, and the pass at "
                    "w + epsilon would read other values: let the function change a copy of it"
                )
            if (
                isinstance(value, Tensor)
                and value.grad_fn is not None
                and now is value
                and _is_used_whole(holder)
            ):
                graphs.append(value)
            if _is_same(now, value):
                self._found[key] = holder, now, _version(now)
            else:  # the function has rebound it
                self._found.pop(key, None)
        for key, (holder, _, _) in self._found.items():
            now = _value(holder, key[1])
            self._found[key] = holder, now, _version(now)
        return graphs


def _is_used_whole(holder: Holder) -> bool:
    """Return whether a function uses all that *holder* has: a variable of a closure, or the arguments.

    Globals, lists and dictionaries may also have what it does not use, as the losses of earlier updates.
    """
    return isinstance(holder, (types.CellType, tuple))


class _Names(NamedTuple):
    """The names in a function's code, and in functions within it."""

    globals: frozenset[str]
    attributes: frozenset[str]
    written: frozenset[str]


def _read_by(function: Any) -> Iterator[tuple[Holder, Any]]:
    """Yield what *function* reads and does not write: variables, and what is in the containers in them.

    Of the objects in them these are the attributes that its code names. Functions in its closure, its module
    and its object are looked into too.
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
        layer = [owner, *values]
        for _ in range(_DEEP):
            inner = [part for value in layer for part in _parts_of(value, names.attributes)]
            layer = [_value(*part) for part in inner]
            found += inner
        methods = [getattr(type(owner), name, None) for name in names.attributes]
        methods = [getattr(method, "fget", method) for method in methods]  # of properties
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


def _parts_of(value: Any, names: frozenset[str]) -> Iterator[tuple[Holder, Any]]:
    """Yield where the elements of a container are, or the attributes of an object that have *names*."""
    value = value.data if isinstance(value, UserDict) else _owner(value)
    if isinstance(value, (tuple, list, dict, deque)):
        if len(value) < _LONG:
            yield from ((value, name) for name in (value if isinstance(value, dict) else range(len(value))))
    else:
        attributes = _attributes(value)
        yield from ((attributes, name) for name in names & attributes.keys())


def _elements(value: Any) -> Iterator[tuple[Holder, Any]]:
    """Yield where the elements of an argument are that is a container, and those of containers within it."""
    if isinstance(value, (tuple, list, dict, deque, UserDict)):
        for holder, name in _parts_of(value, frozenset()):
            yield holder, name
            yield from _elements(_value(holder, name))


def _tensors_of_objects(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where the tensors of objects are, as of a batch, that are in the containers of an argument."""
    for holder, name in _elements(value):
        attributes = _attributes(_value(holder, name))
        yield from ((attributes, name) for name, each in attributes.items() if isinstance(each, Tensor))


def _containers(value: Any) -> Iterator[Any]:
    """Yield the lists and dictionaries in an argument."""
    if isinstance(value, (tuple, list, dict, UserDict)) and len(value) < _LONG:
        if not isinstance(value, tuple):
            yield value
        for each in list(value.values()) if isinstance(value, (dict, UserDict)) else value:
            yield from _containers(each)


def _content(container: Any) -> list[Any]:
    """Return the elements of a list, or the keys and values of a dictionary."""
    return [*container] if isinstance(container, list) else [*container.items()]


def _owner(value: Any) -> Any:
    """Return the object of which *value* is a method that is not written in Python, or *value* itself."""
    is_method = isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType))
    return value.__self__ if is_method else value


def _gives_next(value: Any) -> bool:
    """Return whether *value* is an iterator, of whatever kind, but no file: that is for writing to."""
    kind = type(value)
    return (hasattr(kind, "__next__") or hasattr(kind, "next")) and not issubclass(kind, io.IOBase)


def _held(value: Any) -> Any:
    """Return what is in something that a function takes values out of; ``None`` of anything else."""
    value = _owner(value)
    if isinstance(value, (list, deque)) and len(value) < _LONG:
        return [*map(id, value)]
    if isinstance(value, (dict, UserDict)) and len(value) < _LONG:
        return [*value]
    return value.qsize() if isinstance(value, queue.Queue) else None


def _is_part(now: Any, before: Any) -> bool:
    """Return whether something was taken out and nothing put in."""
    if isinstance(before, int):
        return now < before
    return len(now) < len(before) and set(now) <= set(before)


def _counts(value: Any) -> bool:
    """Return whether a change of *value* in place matters: it is no weight, and no single number."""
    is_weight = isinstance(value, Tensor) and value.requires_grad and value.is_leaf
    return not is_weight and (value.numel() if isinstance(value, Tensor) else value.size) > 1


def _value(holder: Holder, name: Any) -> Any:
    try:
        return holder.cell_contents if isinstance(holder, types.CellType) else holder[name]
    except (ValueError, LookupError):  # an empty cell, or no such name or index
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
    """Return what changes when something writes into a tensor or an array of numpy."""
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        return zlib.crc32(value.tobytes()) if value.nbytes <= _LARGE else 0
    if not isinstance(value, Tensor) or is_lazy(value) or value.is_inference():
        return 0
    return value._version
