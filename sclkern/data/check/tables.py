"""Opening of data for an examination: whatever is broken in one table, the others are read."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sclkern.data.check.report import Finding
from sclkern.data.check.tasks import TaskPictures
from sclkern.data.files import DataFolder
from sclkern.data.names import is_url
from sclkern.data.roots import resolve_root
from sclkern.data.source import SOURCES, PairSource, detect_format, open_pairs
from sclkern.errors import UserError

_UNREADABLE = "table that cannot be read"


@dataclass
class Opened:
    """Sources that could be opened; a place is the number of an image among those of all sources.

    Attributes:
        root: of the data.
        format: of the data.
        tables: files that were named or found.
        sources: all tables in one, or one for each table that can be read.
        defects: tables that cannot be read.
    """

    root: str
    format: str
    tables: list[str]
    sources: list[PairSource] = field(default_factory=list)
    defects: list[Finding] = field(default_factory=list)

    def locate(self, place: int) -> tuple[PairSource, int]:
        """Source and image index of a place."""
        starts = np.cumsum([0] + [source.num_images for source in self.sources])
        number = int(np.searchsorted(starts, place, "right")) - 1
        return self.sources[number], place - int(starts[number])

    def name(self, place: int) -> str:
        """Name of the image of a place."""
        source, image = self.locate(place)
        return source.image_name(image)

    def column(self, name: str) -> list[str | None]:
        """Values of a column for each place; None where a source does not have it."""
        values: list[str | None] = []
        for source in self.sources:
            column = getattr(source, "column", lambda name: None)(name)
            values += [None] * source.num_images if column is None else column.to_pylist()
        return values


def open_tables(target: str, tables: Sequence[str], split: str | None, format: str) -> Opened:
    """Open data for an examination.

    Args:
        target: folder of the data, local or an fsspec URL, or one of its files.
        tables: names of tables; none is every table of the format.
        split: part to read; None reads all.
        format: as ``data.format``.

    Returns:
        The sources, and what cannot be opened.

    Raises:
        UserError: there is no such data, or the format is not known.
    """
    root, tables = _root_of(target, tables)
    folder = DataFolder(root)
    if not folder.is_dir():
        raise UserError(f"{folder.shown()}: no such folder, expected one with data, or a file of data; correct it")
    if format == "auto":
        format = detect_format(folder, tables)
    if format not in SOURCES and ":" not in format:
        raise UserError(f"--format: got {format!r}, expected one of {', '.join(['auto', *SOURCES])}, or module:Class")
    named = bool(tables)
    if not named:
        tables = _all_tables(folder, format)
    opened = Opened(folder.root, format, list(tables))
    read = partial(_read, root, split, format)
    with _quiet():
        try:
            opened.sources = [read(tables)]
        except UserError:
            for table, problem in _one_by_one(folder, tables, _suffixes(format), strict=named):
                if problem is not None:
                    opened.defects.append(Finding(_UNREADABLE, table, problem))
                    continue
                try:
                    opened.sources.append(read([table]))
                except UserError as own:
                    if format == "arrow":
                        with suppress(UserError):  # the other reader's reason is the one that helps
                            opened.sources.append(TaskPictures(root, [table]))
                            continue
                    opened.defects.append(Finding(_UNREADABLE, table, str(own)))
    return opened


def _one_by_one(
    folder: DataFolder, tables: Sequence[str], suffixes: Sequence[str] | None, *, strict: bool
) -> Iterator[tuple[str, str | None]]:
    """The files that each table stands for, or, unless strict, the table and why it stands for none."""
    for table in tables:
        try:
            for name in [table] if suffixes is None else folder.tables([table], suffixes):
                yield name, None
        except UserError as error:
            if strict:
                raise
            yield table, str(error)


def _root_of(target: str, tables: Sequence[str]) -> tuple[Path | str, list[str]]:
    """The folder, and the tables in it; a file is the only table of its folder."""
    folder, _, name = target.rstrip("/").rpartition("/")
    is_file = Path(target).is_file() if not is_url(target) else bool(folder and _is_remote_file(folder, name))
    if not is_file:
        return resolve_root(target), list(tables)
    if tables:
        raise UserError(f"--tables: got {list(tables)} and the file {target}, expected a folder; leave one of them out")
    return resolve_root(folder or ("/" if target.startswith("/") else ".")), [name]


def _is_remote_file(folder: str, name: str) -> bool:
    if folder.endswith(("/", ":")):
        return False  # the name is that of a host or a bucket
    return DataFolder(folder).info(name) is not None


def _all_tables(folder: DataFolder, format: str) -> list[str]:
    if format not in SOURCES:
        raise UserError(f"--tables: got none, expected names, as {format} does not tell which files it reads")
    found = SOURCES[format].files(folder)
    if not found:
        expected = " or ".join(pattern.format(table="*") for pattern in SOURCES[format].patterns)
        raise UserError(f"{folder.shown()}: no file {expected}, expected one or more; correct the folder or --format")
    if _suffixes(format) is not None:
        return found  # a name with its suffix is a table's name, too
    return sorted({_table_of(name, SOURCES[format].patterns) for name in found})


def _suffixes(format: str) -> list[str] | None:
    """Suffixes of a format whose tables are single files; None of another format."""
    patterns = SOURCES[format].patterns if format in SOURCES else ()
    suffixes = [pattern.removeprefix("{table}") for pattern in patterns]
    return suffixes if suffixes and all(re.fullmatch(r"\.\w+", suffix) for suffix in suffixes) else None


def _table_of(name: str, patterns: Sequence[str]) -> str:
    """What stands for ``{table}`` in the name of a file."""
    for pattern in patterns:
        before, _, after = pattern.partition("{table}")
        after = re.escape(after).replace(r"\*", "[^/]*")
        if match := re.fullmatch(f"{re.escape(before)}(.+?){after}", name):
            return match[1]
    return name


def _read(root: Path | str, split: str | None, format: str, tables: Sequence[str]) -> PairSource:
    read: Any = SOURCES[format].read if format in SOURCES else None
    if read is None or "lenient" not in inspect.signature(read).parameters:
        return open_pairs(root, tables, split, format=format)
    source: PairSource = read(root, tables, split, lenient=True)
    return source


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of what is left out, which the report lists."""
    log = logging.getLogger("sclkern.data")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
