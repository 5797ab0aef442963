"""Which program of a launch reads and writes what, under the interpreter: accesses outside the arguments, and races.

The interpreter runs the programs of a launch one after another, so a race between them shows in no result. Here every
masked load, store and atomic is checked before it is made. A pointer argument becomes an address in a range of its own,
so an access is known to belong to an argument however far it strays. One that hits no element of its argument is noted
and left out. Memory is never corrupted, and a gap between strided rows counts as outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

_RANGE = 44  # bits of an argument's range of addresses: strays of terabytes stay in it
_MIDDLE = 1 << (_RANGE - 1)
_NOBODY, _SEVERAL = -1, -2


class _Storage:
    """Who has touched each unit of a storage in this launch."""

    def __init__(self, begin: int, size: int) -> None:
        self.begin = begin
        self.unit = 0  # bytes; the smallest element among the arguments that share the storage
        self.size = size
        self.writers = self.readers = self.adders = np.empty(0, np.int32)

    def share(self, itemsize: int) -> None:
        self.unit = min(self.unit or itemsize, itemsize)

    def clear(self) -> None:
        units = self.size // self.unit + 1
        self.writers, self.readers, self.adders = (np.full(units, _NOBODY, np.int32) for _ in range(3))


@dataclass
class _Argument:
    """A tensor as the kernel gets it: where it is, and which of its addresses are elements."""

    name: str
    begin: int
    itemsize: int
    elements: np.ndarray  # by offset in elements: whether there is one
    storage: _Storage


def _offsets_of_elements(x: Tensor) -> np.ndarray:
    offsets = np.zeros((), np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = np.add.outer(offsets, np.arange(size) * stride)
    found = np.zeros(int(offsets.max()) + 1 if offsets.size else 0, bool)
    found[offsets] = True
    return found


@dataclass
class Watch:
    """What was seen.

    Attributes:
        faults: a line each, the same one once: accesses outside the arguments, and races.
        programs: by kernel, the largest number of programs of a launch.
        accesses: how many elements were read, written and added to.
    """

    faults: list[str] = field(default_factory=list)
    programs: Counter[str] = field(default_factory=Counter)
    accesses: Counter[str] = field(default_factory=Counter)
    _kernel: str = ""
    _arguments: list[_Argument] = field(default_factory=list)
    _names: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _storages: dict[int, _Storage] = field(default_factory=dict)

    def _begin(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kernel = executor.fn.__name__
        self._arguments, self._storages = [], {}
        every = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        self._names = {_identity(x): name for name, x in every.items() if isinstance(x, Tensor)}

    def _address(self, x: Tensor) -> int:
        """The address that stands for a tensor in this launch."""
        whole = x.untyped_storage()
        storage = self._storages.setdefault(whole.data_ptr(), _Storage(whole.data_ptr(), whole.nbytes()))
        storage.share(x.element_size())
        name = self._names.get(_identity(x), "an argument")
        self._arguments.append(_Argument(name, x.data_ptr(), x.element_size(), _offsets_of_elements(x), storage))
        return (len(self._arguments) << _RANGE) + _MIDDLE

    def _start(self) -> None:
        for storage in self._storages.values():
            storage.clear()

    def _note(self, text: str) -> None:
        text = f"{self._kernel}: {text}"
        if text not in self.faults:
            self.faults.append(text)

    def _access(self, kind: str, builder: Any, pointers: Any, mask: Any, values: Any = None) -> tuple[Any, Any]:
        """Pointers and mask of the accesses that may be made, at their true addresses."""
        shape = pointers.data.shape
        asked = np.broadcast_to(mask.data, shape).astype(bool)
        given = pointers.data.astype(np.int64)
        true, allowed = np.zeros(shape, np.int64), np.zeros(shape, bool)
        x, y, z = builder.grid_idx
        program = x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
        which = np.where(asked, given >> _RANGE, 0)
        for number in np.unique(which[asked]):
            argument = self._arguments[number - 1] if 0 < number <= len(self._arguments) else None
            here = which == number
            if argument is None:
                self._note(f"{kind} at an address of no argument")
                continue
            offset = given - (int(number) << _RANGE) - _MIDDLE
            element = offset // argument.itemsize
            inside = here & (offset % argument.itemsize == 0) & (element >= 0) & (element < len(argument.elements))
            inside[inside] = argument.elements[element[inside]]
            if (stray := here & ~inside).any():
                first = int(element[stray][0])
                self._note(f"{kind} outside {argument.name}, which spans {len(argument.elements)}: element {first}")
            true[inside] = argument.begin + offset[inside]
            allowed |= inside
            if inside.any():
                self.accesses[kind] += int(inside.sum())
                at = true[inside]
                if kind == "write":
                    self._collisions(argument, at, np.broadcast_to(values.data, shape)[inside])
                self._order(kind, argument, np.unique(at), program)
        handle = type(pointers)
        return handle(true.astype(np.uint64), pointers.dtype), handle(allowed, mask.dtype)

    def _collisions(self, argument: _Argument, at: np.ndarray, values: np.ndarray) -> None:
        """Lanes of one store that write different values to one address."""
        order = np.argsort(at, kind="stable")
        at, values = at[order], values[order].view(f"u{values.itemsize}")
        if ((at[1:] == at[:-1]) & (values[1:] != values[:-1])).any():
            self._note(f"lanes of one store write different values to one element of {argument.name}")

    def _order(self, kind: str, argument: _Argument, at: np.ndarray, program: int) -> None:
        """Notes an access, and whether it depends on the order of the programs, or of the threads of this one."""
        storage = argument.storage
        unit = (at - storage.begin) // storage.unit
        unit = np.add.outer(unit, np.arange(argument.itemsize // storage.unit)).ravel()
        writers, readers, adders = storage.writers[unit], storage.readers[unit], storage.adders[unit]

        def others(touched: np.ndarray) -> bool:
            return bool(((touched != _NOBODY) & (touched != program)).any())

        name = argument.name
        if others(writers):
            self._note(f"{kind} of what another program writes: {name}")
        if kind != "read" and others(readers):
            self._note(f"{kind} of what another program reads: {name}")
        if kind != "add" and others(adders):
            self._note(f"{kind} of what another program adds to: {name}")
        if (writers == program).any():
            self._note(f"{kind} of what the same program has written, perhaps in another thread: {name}")
        if kind == "write":
            storage.writers[unit] = program
        elif kind == "read":
            storage.readers[unit] = np.where((readers == _NOBODY) | (readers == program), program, _SEVERAL)
        else:
            storage.adders[unit] = np.where((adders == _NOBODY) | (adders == program), program, _SEVERAL)


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.dtype, tuple(x.shape), tuple(x.stride())


@contextmanager
def watched() -> Iterator[Watch]:
    """Every launch under the interpreter inside of the block is watched."""
    watch = Watch()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, add = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    run, convert, index = executor.__call__, interpreter._implicit_cvt, builder.set_grid_idx
    started = [False]

    def watched_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        return load(self, *watch._access("read", self, pointers, mask), other, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        pointers, mask = watch._access("write", self, pointers, mask, value)
        return store(self, pointers, value, mask, *rest)

    def watched_add(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        pointers, mask = watch._access("add", self, pointers, mask)
        return add(self, operation, pointers, value, mask, *rest)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the watch knows no compare-and-swap, block pointer or descriptor")

    def watched_index(self: Any, *place: int) -> None:
        if not started[0]:  # all arguments are known by now
            watch._start()
            started[0] = True
        index(self, *place)

    def watched_convert(argument: Any) -> Any:
        converted = convert(argument)
        if isinstance(argument, Tensor):
            converted.handle.data = np.array([watch._address(argument)], dtype=np.uint64)
        return converted

    def watched_run(self: Any, *args: Any, **kwargs: Any) -> None:
        watch._begin(self, args, kwargs)
        started[0] = False
        run(self, *args, **kwargs)
        dim = interpreter.interpreter_builder.grid_dim
        watch.programs[watch._kernel] = max(watch.programs[watch._kernel], int(np.prod(dim)))

    with (
        mock.patch.object(builder, "create_masked_load", watched_load),
        mock.patch.object(builder, "create_masked_store", watched_store),
        mock.patch.object(builder, "create_atomic_rmw", watched_add),
        mock.patch.object(builder, "create_atomic_cas", refuse),
        mock.patch.object(builder, "create_make_block_ptr", refuse, create=True),  # until triton 3.8
        mock.patch.object(builder, "create_make_tensor_descriptor", refuse),
        mock.patch.object(builder, "set_grid_idx", watched_index),
        mock.patch.object(interpreter, "_implicit_cvt", watched_convert),
        mock.patch.object(executor, "__call__", watched_run),
    ):
        yield watch
