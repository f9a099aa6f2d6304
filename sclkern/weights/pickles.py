"""Files of ``torch.save``, read without importing or calling anything that they name.

A pickle is a program: it names functions and classes and calls them. Here every name is a ``StandIn``, which keeps what
it is given and does nothing, so a file may hold objects of any class, also of packages that are not installed. Tensors
are then made from what the calls of torch's own functions were given. (``weights_only=True`` of ``torch.load`` is as
safe, but refuses a whole file for one object of a class derived from dict or list.)
"""

from __future__ import annotations

import io
import operator
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from sclkern.errors import UserError

# Functions of these modules act on the system; a file of weights has no reason to name one.
SYSTEM_MODULES = ("os", "posix", "nt", "sys")
# How a file of ``torch.save`` before 1.6 begins.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}
# The calls that make a tensor, by what their arguments are.
PLAIN = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
WRAPPED = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
SUBCLASS = "torch._tensor._rebuild_from_type_v2"


class StandIn(type):
    """Takes the place of a class, a function, an object or the result of a call.

    Pickle asks that what it makes objects of is a class, and any call may have returned it: so each is one.

    Attributes:
        origin: the name in the file, "module.name"; of an object, that of what made it.
        arguments: what it was made with.
        entries: what was put into it by key.
        state: what was set as its state.
    """

    origin: str
    arguments: tuple[Any, ...]
    entries: dict[Any, Any]
    state: Any

    def __new__(cls, origin: str, arguments: tuple[Any, ...] = ()) -> StandIn:
        """A new one that nothing was put into."""
        made = super().__new__(cls, "StandIn", (_Made,), {})
        made.origin, made.arguments, made.entries, made.state = origin, arguments, {}, None
        return made

    def __init__(cls, *arguments: Any) -> None:
        """Nothing: the one of ``type`` takes other arguments."""

    def __call__(cls, *arguments: Any, **keywords: Any) -> StandIn:
        return StandIn(cls.origin, arguments)

    def __setitem__(cls, key: Any, value: Any) -> None:
        cls.entries[key] = value

    def __setstate__(cls, state: Any) -> None:
        cls.state = state

    def extend(cls, values: Any) -> None:
        """Stand in for a list."""

    def append(cls, value: Any) -> None:
        """Stand in for a list."""

    def add(cls, value: Any) -> None:
        """Stand in for a set."""


class _Made:
    """The base of stand-ins, for pickle's own way to make an object of a class without calling it."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        return cls(*arguments)


class Storage(NamedTuple):
    """The numbers of a tensor in the file, as the pickle refers to them.

    Attributes:
        kind: name of the storage's class, "FloatStorage".
        key: of its bytes.
        start: of the bytes that are meant; not 0 only in files of torch before 0.4.
    """

    kind: str
    key: str
    start: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return DTYPES[self.kind.removesuffix("Storage")]


class Unpickler(pickle.Unpickler):
    """Resolves each name to a stand-in.

    Args:
        file: the pickle.
        where: the file's name, for messages.
    """

    def __init__(self, file: BinaryIO, where: object) -> None:
        super().__init__(file, encoding="latin1")
        self.where = where
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for whatever is named."""
        if module.split(".")[0] in SYSTEM_MODULES:
            raise UserError(
                f"{self.where}: refers to {module}.{name}, an operating-system call, refused; take weights you can "
                "trust"
            )
        return StandIn(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """What stands for the bytes of a storage."""
        if pid[0] != "storage":  # the class of a module, with its source
            return pid[1]
        kind, key, view = pid[1].origin.rpartition(".")[2], str(pid[2]), pid[5] if len(pid) > 5 else None
        whole = Storage(kind, key)
        self.storages.setdefault(key, whole)
        return whole if view is None else whole._replace(start=view[1] * whole.dtype.itemsize)


class Piece(NamedTuple):
    """Where bytes stand in a file.

    Attributes:
        start: of the first.
        size: their number.
        checksum: CRC-32; 0 if it was not computed.
    """

    start: int
    size: int
    checksum: int = 0


class SavedFile:
    """A file of ``torch.save``.

    Args:
        path: of the file.

    Attributes:
        content: what was saved: dicts, lists and plain values; all else are stand-ins, tensors too.

    Raises:
        UserError: it refers to an operating-system call, or is a pickle of another program.
        Exception: of any kind: the file is damaged or of another format.
    """

    content: Any

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = torch.UntypedStorage.from_file(os.fspath(path), False, path.stat().st_size)
        self._read: dict[str, torch.UntypedStorage] = {}
        if zipfile.is_zipfile(path):
            self._open_archive()
        else:
            with path.open("rb") as file:
                self._open_legacy(file)

    def _open_archive(self) -> None:
        with zipfile.ZipFile(self.path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickled = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickled) != 1:
                raise ValueError("a zip archive without the member data.pkl of torch.save")
            root = pickled[0].removesuffix("data.pkl")
            if packed := [name for name, info in members.items() if info.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"the member {packed[0]} is compressed, which torch.save never does")
            with self.path.open("rb") as file:
                pieces = {name: _piece(file, info) for name, info in members.items()}
        data = f"{root}data/"
        self._pieces = {name.removeprefix(data): piece for name, piece in pieces.items() if name.startswith(data)}
        order = pieces.get(f"{root}byteorder")
        self._swapped = (b"little" if order is None else self._raw(order)) != sys.byteorder.encode()
        # Kept in memory: the reader must not go on behind the end of the member.
        self.content = Unpickler(io.BytesIO(self._raw(pieces[pickled[0]])), self.path).load()

    def _open_legacy(self, file: BinaryIO) -> None:
        """Magic number, version, the writer's machine, content, keys of storages; of each storage length and bytes."""
        if Unpickler(file, self.path).load() != LEGACY_MAGIC:
            raise UserError(
                f"{self.path}: is a pickle that torch.save did not write; load it with the program that wrote it, and "
                "save its tensors by name with torch.save or as safetensors"
            )
        Unpickler(file, self.path).load()
        machine = Unpickler(file, self.path).load()
        self._swapped = (sys.byteorder == "little") != machine["little_endian"]
        unpickler = Unpickler(file, self.path)
        self.content = unpickler.load()
        self._pieces = {}
        for key in Unpickler(file, self.path).load():
            (count,) = struct.unpack("<q", file.read(8))
            size = count * unpickler.storages[key].dtype.itemsize
            if not 0 <= size <= len(self._bytes) - file.tell():
                raise EOFError("the file ends within the weights")
            self._pieces[key] = Piece(file.tell(), size)
            file.seek(size, os.SEEK_CUR)

    def _raw(self, piece: Piece) -> bytes:
        return _as_bytes(self._piece(piece)).tobytes()

    def _piece(self, piece: Piece) -> torch.UntypedStorage:
        """The bytes of a piece, memory-mapped, after a look at their checksum."""
        if not piece.size:
            return torch.UntypedStorage(0)
        if not 0 <= piece.start <= piece.start + piece.size <= len(self._bytes):
            raise EOFError("the file ends within the weights")
        found = self._bytes[piece.start : piece.start + piece.size]
        if piece.checksum and zlib.crc32(_as_bytes(found)) != piece.checksum:
            raise ValueError(f"{piece.size} bytes of it are not those that were written, by their checksum")
        return found

    def _storage(self, storage: Storage) -> torch.UntypedStorage:
        if storage.key not in self._read:
            found = self._piece(self._pieces[storage.key])
            if self._swapped:
                found = found.clone()
                found.byteswap(storage.dtype)
            self._read[storage.key] = found
        found = self._read[storage.key]
        return found[storage.start :] if storage.start else found

    def tensor(self, made: StandIn) -> Tensor:
        """Make the tensor that a stand-in is in place of.

        Args:
            made: for which ``is_tensor`` is true.

        Returns:
            The tensor, memory-mapped from the file where its byte order is the machine's.

        Raises:
            TypeError: of a kind that has no plain values: quantised, sparse, on the meta device, of a class of its own.
            Exception: of any kind: the file is damaged.
        """
        origin, arguments = made.origin, made.arguments
        if origin in WRAPPED:
            return self.tensor(arguments[0])
        if origin == SUBCLASS:
            origin, arguments = arguments[0].origin, arguments[2]
        if origin not in PLAIN:
            raise TypeError(origin.rpartition(".")[2])
        storage, offset, size, stride = arguments[:4]
        dtype, extra = storage.dtype, arguments[6] if len(arguments) > 6 else None
        if origin.endswith("_v3"):
            dtype = getattr(torch, arguments[6].origin.rpartition(".")[2])
        elif extra:  # bits of a conjugated or negated view
            raise TypeError(f"a view with {', '.join(map(str, extra))}")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"of {dtype}")
        return torch.empty(0, dtype=dtype).set_(self._storage(storage), offset, _sizes(size), _sizes(stride))


def is_tensor(value: object) -> bool:
    """Whether a value of ``SavedFile.content`` is a tensor, of whatever kind."""
    if not isinstance(value, StandIn):
        return False
    return value.origin == SUBCLASS or (value.origin.startswith("torch._utils._rebuild_") and bool(value.arguments))


def entries_of(value: object) -> Mapping[Any, Any]:
    """What an object holds by key: a mapping's items, otherwise an object's attributes.

    Args:
        value: a mapping, or a stand-in of ``SavedFile.content``.

    Returns:
        The entries; {} of anything else.
    """
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, StandIn) or is_tensor(value):
        return {}
    if value.entries:
        return value.entries
    if value.arguments and isinstance(value.arguments[0], Mapping):
        return value.arguments[0]
    states = value.state if isinstance(value.state, tuple) else (value.state,)
    return {key: entry for state in states if isinstance(state, dict) for key, entry in state.items()}


def _sizes(value: Any) -> tuple[int, ...]:
    """The numbers of a size or stride, which is a tuple or a ``torch.Size``."""
    numbers = value.arguments[0] if isinstance(value, StandIn) else value
    return tuple(operator.index(number) for number in numbers)


def _as_bytes(storage: torch.UntypedStorage) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _piece(file: BinaryIO, member: zipfile.ZipInfo) -> Piece:
    """Where the content of an uncompressed member of a zip archive stands."""
    file.seek(member.header_offset)
    # The central directory does not tell how long the name and the padding are that stand before the content.
    name, padding = struct.unpack("<26xHH", file.read(30))
    return Piece(member.header_offset + 30 + name + padding, member.file_size, member.CRC)
