"""Indices of data files: built once, compared with what they were built from, memory-mapped by every process."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from sclkern.data.files import DataFolder, cache_folder
from sclkern.data.parallel import cores, map_in_processes
from sclkern.errors import UserError
from sclkern.io import write_atomically

_log = logging.getLogger("sclkern.data")
# Raised when indices of earlier versions can no longer be read.
_VERSION = 2
_KEY = b"sclkern"


@dataclass(frozen=True)
class Index:
    """What a reader keeps of a file.

    Attributes:
        table: a row for each image.
        dropped: rows that are known to have no image, by the reason that the writer of the data gives.
        defects: name and reason of each other sample that was left out.
        missing: paths of the files that some of those name and that are not there; they may come later.
    """

    table: pa.Table
    dropped: dict[str, int] = field(default_factory=dict)
    defects: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


Build = Callable[[DataFolder, str], Index]


def open_indices(
    folder: DataFolder,
    names: Sequence[str],
    build: Build,
    *,
    schema: pa.Schema,
    built_from: Callable[[DataFolder, str], list[str]],
) -> list[Index]:
    """Open the index of each file, and build those that are missing or older than their file.

    An index lies beside its file, as ``<file>.index``, or in ``cache_folder`` where it cannot be written there.
    Indices are built in one process a core. A process that opens them again, such as a worker, builds nothing.

    Args:
        folder: of the data.
        names: of the files, relative to the folder.
        build: reads one file.
        schema: columns that ``build`` gives.
        built_from: names of all the files that ``build`` reads for one, that one first.

    Returns:
        The indices in the order of the names; the columns lie in the mapped files.

    Raises:
        UserError: a file is missing, or ``build`` refuses it; the first in the order of the names.
        WorkerError: a process that builds has died.
    """
    wanted = {name: _identity(folder, name, built_from(folder, name), schema) for name in names}
    found = {name: _find(folder, name, identity, schema) for name, identity in wanted.items()}
    missing = [name for name, index in found.items() if index is None]
    if len(missing) > 1:
        _log.info("%s: building the index of %d files, once", folder.shown(), len(missing))
    paths = map_in_processes(
        lambda name: _build(folder, name, build, wanted[name]),
        missing,
        workers=min(cores(), len(missing)),
        description="indexing",
        unit="file",
        total=len(missing),
    )
    for name, path in zip(missing, paths, strict=True):
        found[name] = _load(path, wanted[name], schema)
        if found[name] is None:
            raise UserError(f"{path}: the index was changed while it was read; start again")
    return [index for name in names if (index := found[name]) is not None]


def forget_index(folder: DataFolder, name: str) -> None:
    """Remove the index of a file, such as one that lists defects which may have been repaired since.

    Args:
        folder: of the data.
        name: of the file.
    """
    for place in _places(folder, name):
        with suppress(OSError):  # missing, or not ours to remove
            place.unlink()


def _places(folder: DataFolder, name: str) -> list[Path]:
    """Where the index of a file may lie, the first choice first."""
    place = hashlib.blake2b(f"{folder.root}\n{name}".encode(), digest_size=12).hexdigest()
    if folder.local_root is None:
        return [cache_folder() / "indices" / place / f"{name.rpartition('/')[2]}.index"]
    path = folder.path(name)
    place = hashlib.blake2b(str(path.resolve()).encode(), digest_size=12).hexdigest()
    return [path.with_name(f"{path.name}.index"), cache_folder() / "indices" / place / f"{path.name}.index"]


def _identity(folder: DataFolder, name: str, files: Sequence[str], schema: pa.Schema) -> dict[str, Any]:
    """What an index must say of itself to be taken for one of these files as they are now."""
    versions = {}
    for file in files:
        info = folder.info(file)
        if info is None:
            raise UserError(f"{folder.shown(file)}: no such file; correct data.root or the names of the tables")
        versions[file.rpartition("/")[2]] = [info.size, info.stamp]
    return {"version": _VERSION, "columns": schema.names, "files": versions}


def _find(folder: DataFolder, name: str, identity: dict[str, Any], schema: pa.Schema) -> Index | None:
    there = [place for place in _places(folder, name) if place.is_file()]
    index = next((index for place in there if (index := _load(place, identity, schema)) is not None), None)
    if there and index is None:
        _log.info("%s: its index %s is of another version of it and is built again", folder.shown(name), there[0])
    return index


def _load(path: Path, identity: dict[str, Any], schema: pa.Schema) -> Index | None:
    """The index at ``path``; None if it is broken, or was built from other files."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        notes = json.loads((table.schema.metadata or {})[_KEY])
        if notes["identity"] != identity or not table.schema.equals(schema):
            return None
        # Offsets in a damaged file would lead out of the map.
        table.validate(full=True)
        defects = [(str(sample), str(reason)) for sample, reason in notes["defects"]]
        dropped = {str(reason): int(count) for reason, count in notes["dropped"].items()}
        return Index(table, dropped, defects, [str(path) for path in notes["missing"]])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build(folder: DataFolder, name: str, build: Build, identity: dict[str, Any]) -> Path:
    index = build(folder, name)
    notes = {"identity": identity, "dropped": index.dropped, "defects": index.defects, "missing": index.missing}
    table = index.table.replace_schema_metadata({_KEY: json.dumps(notes)})
    places = _places(folder, name)
    for place in places:
        try:
            write_atomically(place, partial(_write, table))
            return place
        except UserError:  # read-only, as shared data often are
            if place == places[-1]:
                raise
    raise AssertionError("there is a last place")


def _write(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=65536)
