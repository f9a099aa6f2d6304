"""What the programs of a launch do to the memory of its arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Two bytes that no computation leaves: of a float16, a bfloat16 or a float32 a NaN, of an integer far out of range.
POISON = 0x7FA5
PATTERN = POISON.to_bytes(2, "little") * 4
# In place of a program: several programs, or atomics of any.
SEVERAL, ATOMIC = -1, -2
# Lanes that have been read and not yet been noted. A storage that no program writes, as most inputs, need not note any.
PENDING_LANES = 2**22


class SanitizerError(AssertionError):
    """A kernel does to memory what a GPU forbids, or what differs from run to run."""


def poison(tensor: Tensor) -> Tensor:
    """``tensor``, filled with ``POISON``; a read of it is a fault."""
    size = tensor.element_size()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size)
    if integer is not None:
        tensor.detach().view(integer).fill_(int.from_bytes(PATTERN[:size], "little"))
    return tensor


def is_poison(values: np.ndarray) -> np.ndarray:
    """Which values, of 1, 2, 4 or 8 bytes, are poison."""
    kind = f"u{values.dtype.itemsize}"
    return values.view(kind) == np.frombuffer(PATTERN, kind, 1)


@dataclass(eq=False)
class Storage:
    """Who read and wrote the units of a storage, programs counted from 1.

    Attributes:
        start: address of the first byte.
        size: bytes.
        unit: bytes that one entry stands for, the size of the smallest element of the arguments in it.
    """

    start: int
    size: int
    unit: int
    writer: np.ndarray | None = None
    reader: np.ndarray | None = None
    lane: np.ndarray | None = None
    pending: list[tuple[np.ndarray, int]] = field(default_factory=list)
    pending_lanes: int = 0

    def units(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """Indices of the units that accesses of ``size`` bytes touch."""
        if size < self.unit:
            self._refine(size)
        width = size // self.unit
        first = self.first_units(offsets)
        return first if width == 1 else (first[:, None] + np.arange(width)).reshape(-1)

    def first_units(self, offsets: np.ndarray) -> np.ndarray:
        """Index of the unit at each offset; sizes are powers of two."""
        return offsets >> (self.unit.bit_length() - 1)

    @property
    def entries(self) -> int:
        """Units of the storage."""
        return -(-self.size // self.unit)

    def _refine(self, unit: int) -> None:
        """Entries for smaller units."""
        self._note_pending()
        factor, self.unit, self.lane = self.unit // unit, unit, None
        self.writer = None if self.writer is None else self.writer.repeat(factor)
        self.reader = None if self.reader is None else self.reader.repeat(factor)

    def _note_pending(self) -> None:
        if self.pending and self.reader is None:
            self.reader = np.zeros(self.entries, np.int32)
        for units, program in self.pending:
            seen = self.reader[units]
            self.reader[units] = np.where((seen == 0) | (seen == program), program, SEVERAL)
        self.pending.clear()
        self.pending_lanes = 0

    def read(self, units: np.ndarray, program: int) -> Meeting | None:
        """Note a read."""
        self.pending.append((units, program))
        self.pending_lanes += units.size
        if self.pending_lanes > PENDING_LANES:
            self._note_pending()
        return None if self.writer is None else _meeting(self.writer[units], program, "written")

    def write(self, units: np.ndarray, program: int, atomic: bool = False) -> Meeting | None:
        """Note a write."""
        self._note_pending()
        if self.writer is None:
            self.writer = np.zeros(self.entries, np.int32)
        met = _meeting(self.writer[units], program, "written", ATOMIC if atomic else 0)
        if met is None and self.reader is not None:
            met = _meeting(self.reader[units], program, "read")
        self.writer[units] = ATOMIC if atomic else program
        return met

    def clashes(self, offsets: np.ndarray, values: np.ndarray) -> np.ndarray | None:
        """Which lanes of a store another lane of it overwrites with another value; None: none."""
        if self.lane is None:
            self.lane = np.zeros(self.entries, np.int32)
        first, lanes = self.first_units(offsets), np.arange(offsets.size, dtype=np.int32)
        self.lane[first] = lanes
        last = self.lane[first]
        if (last == lanes).all():
            return None
        bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
        different = bits != bits[last]
        return different if different.any() else None


class Meeting(NamedTuple):
    """Where programs meet: which units, what the other did there, its number, ``SEVERAL`` or ``ATOMIC``."""

    where: np.ndarray
    what: str
    other: int


def _meeting(programs: np.ndarray, program: int, what: str, allowed: int = 0) -> Meeting | None:
    """Where ``programs`` are others than this one; 0 is none."""
    where = (programs != 0) & (programs != program) & (programs != allowed)
    return Meeting(where, what, int(programs[where][0])) if where.any() else None


@dataclass(eq=False)
class Argument:
    """The tensors of a launch that begin at one address, under the names of their parameters.

    Attributes:
        names: parameters of the kernel.
        tensors: what was passed for each.
        storage: what they are views of.
    """

    names: list[str]
    tensors: list[Tensor]
    storage: Storage
    _own: np.ndarray | None = None

    def __str__(self) -> str:
        return "/".join(self.names)

    @property
    def start(self) -> int:
        """Bytes from the beginning of the storage to the first element."""
        return self.tensors[0].data_ptr() - self.storage.start

    def lacks(self, offsets: np.ndarray) -> np.ndarray | None:
        """Which offsets are not of an element of the tensors; None: none of them."""
        if len(self.tensors) == 1 and self.tensors[0].is_contiguous():
            size = self.tensors[0].numel() * self.tensors[0].element_size()
            if size == self.storage.size:
                return None
            outside = (offsets < self.start) | (offsets >= self.start + size)
        else:
            if self._own is None or self._own.size < self.storage.entries:
                self._own = self._elements()
            outside = ~self._own[self.storage.first_units(offsets)]
        return outside if outside.any() else None

    def _elements(self) -> np.ndarray:
        """Which units of the storage belong to an element."""
        unit, own = self.storage.unit, np.zeros(self.storage.entries, bool)
        for tensor in self.tensors:
            width = tensor.element_size() // unit
            strides = [width * stride for stride in tensor.stride()]
            first = own[self.start // unit :]
            view = np.lib.stride_tricks.as_strided(first, (*tensor.shape, width), (*strides, 1))
            view[...] = True
        return own


class Memory:
    """The memory of a launch: its arguments, by the addresses at which they begin."""

    def __init__(self, tensors: list[tuple[str, Tensor]]) -> None:
        units: dict[int, int] = {}
        for _, tensor in tensors:
            start = tensor.untyped_storage().data_ptr()
            units[start] = min(units.get(start, 8), tensor.element_size())
        self.storages = {}
        self.arguments: dict[int, Argument] = {}
        for name, tensor in tensors:
            whole = tensor.untyped_storage()
            if whole.data_ptr() not in self.storages:
                start = whole.data_ptr()
                self.storages[start] = Storage(start, whole.nbytes(), units[start])
            argument = self.arguments.setdefault(tensor.data_ptr(), Argument([], [], self.storages[whole.data_ptr()]))
            argument.names.append(name)
            if not any(_is_same(tensor, other) for other in argument.tensors):
                argument.tensors.append(tensor)

    def holding(self, address: int) -> Argument | None:
        """Of a pointer that came from no argument: the argument in whose storage it lies."""
        for argument in self.arguments.values():
            if 0 <= address - argument.storage.start < argument.storage.size:
                return argument
        return None


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
