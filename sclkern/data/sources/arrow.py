"""(image, caption) pairs in the arrow layout of ViLT and METER, memory-mapped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from sclkern.data.files import DataFolder
from sclkern.data.images import decode_image
from sclkern.data.indexed import number_pairs
from sclkern.data.text import one_line
from sclkern.data.undecodable import undecodable_limit
from sclkern.errors import UserError

_COLUMNS = {
    "image": pa.binary(),
    "caption": pa.list_(pa.string()),
    "image_id": pa.string(),
    "split": pa.string(),
}
# What a row shows: a picture, or the frames of a clip.
_CONTENTS = {"image": pa.binary(), "frames": pa.list_(pa.binary())}
_REWRITE = "write it again with sclkern.data.sources.arrow.write_pairs"


class ArrowPairs:
    """Pairs of one image and one of its captions, over one or more memory-mapped arrow files.

    A file is a pyarrow IPC *file* with the columns ``image`` (binary: an encoded image), ``caption`` (list of string),
    optionally ``image_id`` (string or integer) and ``split`` (string). Images and captions stay in the mapped files, so
    processes share their pages; only index arrays are held. (A compressed file must be decompressed into memory: write
    it without compression.)

    Equal captions of one image count once, at the place of the first.

    Args:
        root: Folder of the files, or an fsspec URL, whose files are copied to ``cache_folder`` once, to be mapped.
        tables: File names without ``.arrow``, in order; also patterns, see ``DataFolder.tables``.
        split: Value of the ``split`` column to keep; None keeps every row.

    Attributes:
        num_images: Number of images.
        num_pairs: Number of (image, caption) pairs.
        pair_image: (num_pairs,) int64, image index in ``[0, num_images)``, non-decreasing.
        pair_group: (num_pairs,) int64, id of the caption's text: the same text has the same id in all files.
        digest: of the pairs and their captions, see ``sclkern.data.digest``.

    Raises:
        UserError: A file is missing or unreadable, a column is missing or of another type, the split has no
            row, more kept rows have no image than may be undecodable, one has no caption, or a caption is null or
            blank.
    """

    num_images: int
    num_pairs: int
    pair_image: np.ndarray
    pair_group: np.ndarray
    digest: str
    # The column of what a row shows, and its type; of clips another one.
    _content = ("image", pa.binary())

    def __init__(self, root: Path | str, tables: Sequence[str], split: str | None = None) -> None:
        self.split = split
        folder = DataFolder(root)
        names = folder.tables(tables, [".arrow"])
        for name in names:
            if folder.info(name) is None:
                there = ", ".join(folder.glob(f"{'/'.join([*name.split('/')[:-1], '*.arrow'])}")) or "none"
                raise UserError(f"{folder.shown(name)} does not exist; the .arrow files there: {there}")
        self._paths = [folder.local_copy(name) for name in names]
        self._open()
        self._index()

    def image(self, image: int) -> Image.Image:
        """Image ``image``, decoded to mode RGB; raises ``ValueError`` if it cannot be decoded."""
        return decode_image(self.image_bytes(image))

    def image_bytes(self, image: int) -> memoryview:
        """Image ``image`` as encoded in the file, a view of the mapped file; raises ``ValueError`` if it is null."""
        return memoryview(self._value(image).as_buffer())

    def _value(self, image: int) -> Any:
        """What the file has of an image; raises ``ValueError`` if it is null."""
        batch, row = self._locate(image)
        value = self._batches[batch].column(self._content[0])[row]
        if not value.is_valid:
            raise ValueError("there is no image (null)")
        return value

    def image_name(self, image: int) -> str:
        """Where image ``image`` comes from, for messages: ``"pairs.arrow row 17 (noto/1f30e)"``."""
        batch, row = self._locate(image)
        name = self._row_name(batch, row)
        if "image_id" in self._batches[batch].schema.names:
            name += f" ({self._batches[batch].column('image_id')[row].as_py()})"
        return name

    def caption(self, pair: int) -> str:
        """The caption of ``pair``."""
        batch, row = self._locate(int(self.pair_image[pair]))
        return self._batches[batch].column("caption")[row].values[int(self._pair_item[pair])].as_py()

    def column(self, name: str) -> pa.ChunkedArray | None:
        """Values of a column for each image, such as ``split`` or ``image_id``; null in files without it.

        Args:
            name: of the column.

        Returns:
            (num_images,) texts; None if no file has the column.
        """
        parts = [
            batch.column(name).cast(pa.large_string())
            if name in batch.schema.names
            else pa.nulls(batch.num_rows, pa.large_string())
            for batch in self._batches
        ]
        if not any(name in batch.schema.names for batch in self._batches):
            return None
        return pa.chunked_array(parts).take(pa.array(self._image_row))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_batches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        batches: list[pa.RecordBatch] = []
        file_rows: list[tuple[int, int]] = []
        for file, path in enumerate(self._paths):
            row = 0
            for batch in read_batches(path):
                batches.append(batch)
                file_rows.append((file, row))
                row += batch.num_rows
        self._batches = batches
        self._batch_file_row = file_rows
        self._batch_start = np.cumsum([0] + [batch.num_rows for batch in batches])[:-1]

    def _index(self) -> None:
        for number, batch in enumerate(self._batches):
            self._check_columns(number)
            try:
                batch.validate(full=True)
            except pa.ArrowException as error:
                raise _unreadable(self._paths[self._batch_file_row[number][0]], error) from error
        selected = [self._in_split(batch) for batch in self._batches]
        if not any(mask.any() for mask in selected):
            raise self._nothing_kept()

        texts: list[pa.Array] = []
        lengths: list[np.ndarray] = []
        without_image: list[np.ndarray] = []
        for number, (batch, mask) in enumerate(zip(self._batches, selected, strict=True)):
            captions = batch.column("caption")
            length = pc.list_value_length(captions).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
            without_image.append(mask & _nulls(batch.column(self._content[0])))
            self._refuse(number, mask & (length == 0), "has no caption")
            lengths.append(length)
            # 32-bit offsets end at 2 GiB of text, which a large collection passes.
            texts.append(captions.flatten().cast(pa.large_string()))

        keep_row, length = np.concatenate(selected), np.concatenate(lengths)
        self._check_images(keep_row, np.concatenate(without_image))
        row = np.repeat(np.arange(len(length)), length)
        item = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        keep = keep_row[row]
        encoded = pa.chunked_array(texts).dictionary_encode()  # one dictionary, shared by the chunks
        code = np.concatenate([_codes(chunk) for chunk in encoded.chunks])
        trimmed = pc.utf8_trim_whitespace(encoded.chunk(0).dictionary)
        blank = np.append(pc.equal(trimmed, "").to_numpy(zero_copy_only=False), True)  # a null's code is -1
        if (bad := keep & blank[code]).any():
            batch, local = self._split_row(int(row[bad.argmax()]))
            raise UserError(
                f"{self._row_name(batch, local)}: caption {int(item[bad.argmax()])} is null or blank, "
                "expected text; remove it from the list"
            )

        numbers = number_pairs(length, encoded.chunk(0).dictionary, keep_row, code)
        self.pair_image, self.pair_group = numbers.pair_image, numbers.pair_group
        self._pair_item, self._image_row, self.digest = numbers.pair_item, numbers.image_row, numbers.digest
        self.num_images, self.num_pairs = len(self._image_row), len(self.pair_image)

    def _check_columns(self, number: int) -> None:
        schema = self._batches[number].schema
        file = self._paths[self._batch_file_row[number][0]].name
        columns = {**_COLUMNS, self._content[0]: self._content[1]}
        for name in (self._content[0], "caption", *(() if self.split is None else ("split",))):
            field = schema.get_field_index(name)
            problem = f"is of type {schema.field(field).type}" if field >= 0 else "is missing"
            if field < 0 or not _fits(schema.field(field).type, columns[name]):
                remedy = "select no split (None)" if name == "split" else _REWRITE
                raise UserError(f"{file}: column '{name}' {problem}, expected {columns[name]}; {remedy}")

    def _in_split(self, batch: pa.RecordBatch) -> np.ndarray:
        if self.split is None:
            return np.ones(batch.num_rows, dtype=bool)
        return pc.equal(batch.column("split"), self.split).fill_null(False).to_numpy(zero_copy_only=False)

    def _nothing_kept(self) -> UserError:
        files = ", ".join(path.name for path in self._paths)
        counts: Counter[str] = Counter()
        if self.split is not None:
            for batch in self._batches:
                for entry in pc.value_counts(batch.column("split")).to_pylist():
                    counts[str(entry["values"])] += entry["counts"]
        if not counts:
            return UserError(f"{files}: no row, expected at least one; {_REWRITE}")
        shown = [f"{one_line(name, 60)} ({count})" for name, count in sorted(counts.items())[:20]]
        there = ", ".join([*shown, *(["..."] if len(counts) > len(shown) else [])])
        return UserError(f"{files}: no row of split '{self.split}', expected one of the splits there: {there}")

    def _check_images(self, keep_row: np.ndarray, without: np.ndarray) -> None:
        """A few rows without an image are left to whoever reads them, as images that cannot be decoded."""
        if (count := int(without.sum())) > undecodable_limit(int(keep_row.sum())):
            name = self._row_name(*self._split_row(int(without.argmax())))
            raise UserError(
                f"{name}: has no image (null), as {count} of {keep_row.sum()} rows, expected 1 % at most, or one; "
                "remove the rows or complete them"
            )

    def _refuse(self, number: int, rows: np.ndarray, what: str) -> None:
        if rows.any():
            name = self._row_name(number, int(rows.argmax()))
            raise UserError(f"{name}: {what}, expected one; remove the row or complete it")

    def _split_row(self, row: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._batch_start, row, side="right")) - 1
        return batch, row - int(self._batch_start[batch])

    def _locate(self, image: int) -> tuple[int, int]:
        return self._split_row(int(self._image_row[image]))

    def _row_name(self, batch: int, row: int) -> str:
        file, first = self._batch_file_row[batch]
        return f"{self._paths[file].name} row {first + row}"


def write_pairs(path: str | Path, rows: Iterable[dict[str, Any]], *, batch_rows: int = 256) -> None:
    """Write rows in the layout that the format "arrow" reads; the file appears whole or not at all.

    Args:
        path: The file to write, ending in ``.arrow``; an older one is replaced.
        rows: Dicts with ``image`` (bytes) or, of clips, ``frames`` (list of bytes), ``caption`` (list of str) and, in
            all rows or none, ``image_id`` (str) and ``split`` (str). Taken one batch at a time, so a generator need not
            fit in memory.
        batch_rows: Rows per record batch.

    Raises:
        UserError: No row, a row with other keys than the first, or a value of another type.
    """
    path = Path(path)
    rows = iter(rows)
    chunk = list(islice(rows, batch_rows))
    if not chunk:
        raise UserError(f"{path}: no row to write, expected at least one")
    keys = set(chunk[0])
    content = "frames" if "frames" in keys else "image"
    columns = {content: _CONTENTS[content], **{name: kind for name, kind in _COLUMNS.items() if name != "image"}}
    if not {content, "caption"} <= keys <= set(columns):
        raise UserError(
            f"{path}: row 0 has the keys {sorted(keys)}, expected image or frames, caption, (image_id), (split)"
        )
    schema = pa.schema([(name, kind) for name, kind in columns.items() if name in keys])
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                start = 0
                while chunk:
                    writer.write_batch(_record_batch(path, start, chunk, schema))
                    start += len(chunk)
                    chunk = list(islice(rows, batch_rows))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _record_batch(path: Path, start: int, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    for number, row in enumerate(rows, start):
        if set(row) != set(schema.names):
            raise UserError(f"{path}: row {number} has the keys {sorted(row)}, expected {schema.names} as in row 0")
        # pyarrow would store a path as if it were an image, and a text as the list of its letters.
        for name, expected in (
            ("image", "the bytes of an image file"),
            ("frames", "a list of the bytes of image files"),
            ("caption", "a list of str"),
        ):
            if isinstance(row.get(name), str):
                raise UserError(f"{path}: row {number}: {name} is the str {row[name]!r:.60}, expected {expected}")
    try:
        return pa.RecordBatch.from_pylist(rows, schema=schema)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        expected = ", ".join(f"{field.name}: {field.type}" for field in schema)
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: rows {start} to {start + len(rows) - 1} do not fit ({reason}), expected {expected}"
        ) from error


def read_batches(path: Path) -> list[pa.RecordBatch]:
    """Map an arrow file.

    Args:
        path: of the file.

    Returns:
        Its record batches, whose columns lie in the mapped file.

    Raises:
        UserError: the file is no whole arrow IPC file.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"{path}: cannot be read ({reason}), expected a whole arrow IPC file (no stream); {_REWRITE}")


def _fits(actual: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(actual) or pa.types.is_large_list(actual)
        return is_list and _fits(actual.value_type, expected.value_type)
    if pa.types.is_string(expected):
        return pa.types.is_string(actual) or pa.types.is_large_string(actual)
    return pa.types.is_binary(actual) or pa.types.is_large_binary(actual)


def _nulls(column: pa.Array) -> np.ndarray:
    return column.is_null().to_numpy(zero_copy_only=False)


def _codes(encoded: pa.DictionaryArray) -> np.ndarray:
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
