"""(image, caption) pairs from JSON, JSON lines, CSV or TSV that names pictures in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa

from sclkern.data.files import DataFolder
from sclkern.data.index import Index
from sclkern.data.indexed import CAPTION, IndexedPairs
from sclkern.data.names import is_plain, is_url
from sclkern.data.record_files import Record, read_records
from sclkern.data.source import register_source
from sclkern.data.text import one_line, read_caption
from sclkern.errors import UserError

_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")


def record_schema(path: str) -> pa.Schema:
    """Columns of the index of a table.

    Args:
        path: name of the first one, with the path of each record's file.

    Returns:
        The columns.
    """
    names = (path, "image_id", "split")
    return pa.schema([*(pa.field(name, pa.large_string()) for name in names), CAPTION])


@register_source(
    "records",
    pattern=[f"{{table}}{suffix}" for suffix in _SUFFIXES],
    never=("*_stats.json", "*.card.json", "*_answers.json"),
)
class RecordPairs(IndexedPairs):
    """Pairs of files that name pictures and captions; ``sclkern.data.record_files`` lists their forms.

    A picture's path is relative to ``root``, or else to the folder of the table, or else to one folder below either,
    such as ``train2014``; a name that lies in several of those is refused. An absolute path must lie in ``root``.
    Captions of one picture are put together, at the place of the first.

    Each table is read through an index of its own (see ``open_indices``).

    Args:
        root: folder of tables and pictures, or an fsspec URL.
        tables: names of the tables without their suffix.
        split: value of the split to keep, or several joined by "+"; None keeps every row.
        lenient: see ``IndexedPairs``.

    Attributes:
        image_ids: (num_images,) int64, equal where tables name the same picture.
        suffixes: of the tables.
        schema: columns of the index.

    Raises:
        UserError: as ``IndexedPairs``; or a table is not of its form, or more than 1 % of its records name no picture
            in the folder, or have no caption.
    """

    image_ids: np.ndarray
    suffixes = _SUFFIXES
    schema = record_schema("image")

    def __init__(
        self, root: Path | str, tables: Sequence[str], split: str | None = None, *, lenient: bool = False
    ) -> None:
        super().__init__(root, tables, split, lenient=lenient)
        paths = self.column(self.schema.names[0])
        assert paths is not None
        self.image_ids = paths.combine_chunks().dictionary_encode().indices.to_numpy().astype("int64")

    def image_bytes(self, image: int) -> bytes:
        """Image ``image`` as its file holds it; raises ``UserError`` if it cannot be read."""
        return self.folder.read(self.path(image))

    def path(self, image: int) -> str:
        """Path of image ``image``, relative to the folder."""
        return str(self._place(image)[1][self.schema.names[0]])

    def image_name(self, image: int) -> str:
        """Where image ``image`` comes from, for messages: ``"captions.json: train2014/1.jpg"``."""
        file, row = self._place(image)
        return f"{file}: {row[self.schema.names[0]]}{'' if row['split'] is None else ' (' + row['split'] + ')'}"

    @staticmethod
    def build(folder: DataFolder, name: str) -> Index:
        """Index a table."""
        return index_records(folder, name, RecordPairs.schema)

    @staticmethod
    def is_there(folder: DataFolder, name: str, paths: Sequence[str]) -> bool:
        """Whether one of the missing pictures of a table is there now."""
        return any_there(folder, name, paths)


def any_there(folder: DataFolder, name: str, paths: Sequence[str], *, folders: bool = False) -> bool:
    """Whether one of these paths is found as those of the records of a table are.

    Args:
        folder: of the data.
        name: of the table.
        paths: relative to the root, to the folder of the table, or to a folder below either.
        folders: whether a path may be that of a folder.

    Returns:
        Whether there is such a file.
    """
    finder = _Finder(folder, name, folders=folders)
    return any(finder.places(path) for path in paths)


def index_records(folder: DataFolder, name: str, schema: pa.Schema, *, folders: bool = False) -> Index:
    """Index a table.

    Args:
        folder: of the data.
        name: of the table.
        schema: of ``record_schema``.
        folders: whether a record may name a folder, such as one of frames.

    Returns:
        The index.

    Raises:
        UserError: the table is not of its form.
    """
    finder = _Finder(folder, name, folders=folders)
    rows: dict[tuple[str, str | None], tuple[str, list[str]]] = {}
    index = Index(pa.table([]))
    for record in read_records(folder, name):
        try:
            if record.problem is not None:
                raise ValueError(record.problem)
            path = finder.find(record)
            captions = [read_caption(caption) for caption in record.captions]
            if not captions:
                raise ValueError("it has no caption")
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            index.defects.append((record.place, str(error)))
            if isinstance(error, _MissingError):
                index.missing.append(error.path)
            continue
        known = rows.setdefault((path, record.split), (record.image_id or path, []))[1]
        known += [caption for caption in captions if caption not in known]
    columns = [
        [path for path, _ in rows],
        [image_id for image_id, _ in rows.values()],
        [split for _, split in rows],
        [captions for _, captions in rows.values()],
    ]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
    return Index(pa.table(arrays, schema=schema), {}, index.defects, index.missing)


class _MissingError(ValueError):
    """A record's picture is not there."""

    def __init__(self, path: str) -> None:
        super().__init__(f"no such picture: {one_line(path, 200)}")
        self.path = path


class _Finder:
    """Finds the pictures of a table; lists each folder once, where asking for each file would take a server's time."""

    def __init__(self, folder: DataFolder, table: str, *, folders: bool = False) -> None:
        self._folder = folder
        self._take_folders = folders
        self._table = table
        self._listed: dict[str, set[str] | None] = {}
        self._root = None if folder.local_root is None else PurePosixPath(folder.local_root.absolute().as_posix())
        beside = table.rpartition("/")[0]
        self._first = list(dict.fromkeys(["", beside]))
        self._below: list[str] | None = None

    def find(self, record: Record) -> str:
        """Path of a record's picture, relative to the root."""
        path = self._relative(record.image)
        found = self.places(path)
        if len(found) > 1:
            raise UserError(
                f"{self._folder.shown(self._table)}: {record.place} names {one_line(path, 200)}, which is {found[0]} "
                f"and {found[1]}, expected one file; name its folder in the table, or leave one of the folders out"
            )
        if not found:
            raise _MissingError(path)
        return found[0]

    def places(self, path: str) -> list[str]:
        """Where a path is: the first place relative to root or table, or else every one in a folder below either."""
        for prefix in self._first:
            if self._is_there(candidate := _join(prefix, path)):
                return [candidate]
        return [candidate for prefix in self._folders() if self._is_there(candidate := _join(prefix, path))]

    def _relative(self, image: object) -> str:
        if not isinstance(image, str) or not image.strip():
            raise ValueError("it names no picture")
        path = image.strip()
        if is_url(path):
            raise ValueError(f"its picture is a URL, {one_line(path, 200)}, expected a file; download it first")
        if path.startswith("/"):
            if self._root is None or not PurePosixPath(path).is_relative_to(self._root):
                raise ValueError(f"its picture lies outside the folder: {one_line(path, 200)}")
            path = str(PurePosixPath(path).relative_to(self._root))
        if not is_plain(path):
            raise ValueError(f"its picture's path leads out of the folder or is not plain: {one_line(path, 200)}")
        return str(PurePosixPath(path))

    def _folders(self) -> list[str]:
        """The folders below the root and below that of the table."""
        if self._below is None:
            self._below = [
                _join(prefix, name)
                for prefix in self._first
                for name in sorted(self._folder.names_in(prefix, folders=True))
            ]
            self._below = [folder for folder in dict.fromkeys(self._below) if folder not in self._first]
        return self._below

    def _is_there(self, path: str) -> bool:
        parent, _, name = path.rpartition("/")
        if parent not in self._listed:
            self._listed[parent] = self._list(parent)
        listed = self._listed[parent]
        return listed is None or name in listed

    def _list(self, parent: str) -> set[str] | None:
        try:
            folders = self._folder.names_in(parent, folders=True) if self._take_folders else set()
            return self._folder.names_in(parent) | folders
        except UserError:
            if self._folder.local_root is not None:
                raise
            return None  # a server that lists nothing; whoever reads the picture will see


def _join(prefix: str, path: str) -> str:
    return f"{prefix}/{path}" if prefix else path
