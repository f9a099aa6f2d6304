"""What readers of indexed files share: pairs of an index, whose captions stay in mapped files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from sclkern.data.digest import digest_pairs, first_pairs
from sclkern.data.files import DataFolder
from sclkern.data.images import decode_image
from sclkern.data.index import Index, forget_index, open_indices
from sclkern.data.text import one_line
from sclkern.data.undecodable import undecodable_limit
from sclkern.errors import UserError

_log = logging.getLogger("sclkern.data")
_SHOWN = 20
CAPTION = pa.field("caption", pa.list_(pa.large_string()))


class IndexedPairs:
    """Pairs of an index. Subclasses are a ``PairSource``: they state what their files and the index are, and give
    ``image_bytes`` and ``image_name``.

    Args:
        root: folder of the files, or an fsspec URL.
        tables: names of the files without their suffix, in order; also patterns, see ``DataFolder.tables``.
        split: value of the ``split`` column to keep, or several joined by "+"; None keeps every row.
        lenient: whether any number of samples may be left out, and none is logged: for an examination.

    Attributes:
        suffixes: of the files of a table.
        schema: columns of the index, ``caption`` among them: captions that are not blank.
        num_images: number of images.
        num_pairs: number of (image, caption) pairs.
        pair_image: (num_pairs,) int64, image index in ``[0, num_images)``, non-decreasing.
        pair_group: (num_pairs,) int64, id of the caption's text.
        digest: of the pairs and their captions, see ``sclkern.data.digest``.
        dropped: rows of the data that are known to have no image, by the reason given for them.
        defects: name and reason of each other sample that was left out.

    Raises:
        UserError: a file is missing or refused, the split has no row, or more than 1 % of the samples were left out.
    """

    suffixes: tuple[str, ...]
    schema: pa.Schema
    num_images: int
    num_pairs: int
    pair_image: np.ndarray
    pair_group: np.ndarray
    digest: str
    dropped: dict[str, int]
    defects: list[tuple[str, str]]

    def __init__(self, root: Any, tables: Sequence[str], split: str | None = None, *, lenient: bool = False) -> None:
        self.folder = DataFolder(root)
        self.files = self.folder.tables(tables, self.suffixes)
        self.split = split
        self.dropped, self.defects = {}, []
        indices = self._open()
        if stale := [file for file, index in zip(self.files, indices, strict=True) if self._came(file, index)]:
            for file in stale:
                forget_index(self.folder, file)
            indices = self._open()
        for file, index in zip(self.files, indices, strict=True):
            self.dropped = dict(Counter(self.dropped) + Counter(index.dropped))
            self.defects += [(f"{file} {sample}", reason) for sample, reason in index.defects]
        if not lenient:
            self._report()
        keep = self._in_split()
        if not keep.any():
            raise self._nothing_kept()
        captions = self._rows.column("caption")
        texts = pa.chunked_array([chunk.flatten() for chunk in captions.chunks], pa.large_string())
        numbers = number_pairs(pc.list_value_length(captions).to_numpy().astype(np.int64), texts, keep)
        self.pair_image, self.pair_group = numbers.pair_image, numbers.pair_group
        self._pair_item, self._image_row, self.digest = numbers.pair_item, numbers.image_row, numbers.digest
        self.num_images, self.num_pairs = len(self._image_row), len(self.pair_image)

    @staticmethod
    def build(folder: DataFolder, name: str) -> Index:
        """Index a file; see ``open_indices``."""
        raise NotImplementedError

    @staticmethod
    def built_from(folder: DataFolder, name: str) -> list[str]:
        """Names of the files that ``build`` reads for one; see ``open_indices``."""
        return [name]

    @staticmethod
    def is_there(folder: DataFolder, name: str, paths: Sequence[str]) -> bool:
        """Whether one of the paths that ``build`` found missing for a file is there now."""
        raise NotImplementedError

    def image(self, image: int) -> Image.Image:
        """Image ``image``, decoded to mode RGB; raises ``ValueError`` if it cannot be read or decoded."""
        return decode_image(self.image_bytes(image))

    def image_bytes(self, image: int) -> bytes:
        """Image ``image`` as its file holds it; raises ``UserError`` if it cannot be read."""
        raise NotImplementedError

    def image_name(self, image: int) -> str:
        """Where image ``image`` comes from, for messages; unique."""
        raise NotImplementedError

    def caption(self, pair: int) -> str:
        """The caption of ``pair``."""
        row = int(self._image_row[self.pair_image[pair]])
        return self._rows.column("caption")[row].values[int(self._pair_item[pair])].as_py()

    def column(self, name: str) -> pa.ChunkedArray | None:
        """Values of a column of the index for each image, such as ``split`` or ``image_id``; None without it."""
        return self._rows.column(name).take(pa.array(self._image_row)) if name in self.schema.names else None

    def _place(self, image: int) -> tuple[str, dict[str, Any]]:
        """The file of an image, and its row there without the captions."""
        row = int(self._image_row[image])
        file = int(np.searchsorted(self._first_row, row, side="right")) - 1
        names = [name for name in self.schema.names if name != "caption"]
        return self.files[file], {name: self._rows.column(name)[row].as_py() for name in names}

    def _came(self, file: str, index: Index) -> bool:
        return bool(index.missing) and self.is_there(self.folder, file, index.missing)

    def _open(self) -> list[Index]:
        indices = open_indices(self.folder, self.files, self.build, schema=self.schema, built_from=self.built_from)
        self._rows = pa.concat_tables([index.table for index in indices])
        self._first_row = np.cumsum([0] + [index.table.num_rows for index in indices])[:-1]
        return indices

    def _report(self) -> None:
        """Name what was left out; an error where it is more than 1 %."""
        if self.dropped:
            reasons = ", ".join(f"{one_line(reason, 60)} {count}" for reason, count in sorted(self.dropped.items()))
            _log.info("%s: %d rows have no image: %s", self.folder.shown(), sum(self.dropped.values()), reasons)
        if not self.defects:
            return
        samples = self._rows.num_rows + len(self.defects)
        named = "; ".join(f"{one_line(name, 200)} ({one_line(reason, 200)})" for name, reason in self.defects[:_SHOWN])
        more = f"; and {len(self.defects) - _SHOWN} more" if len(self.defects) > _SHOWN else ""
        if len(self.defects) > undecodable_limit(samples):
            name, reason = self.defects[0]
            raise UserError(
                f"{self.folder.shown()}: {len(self.defects)} of {samples} samples cannot be used, expected 1 % at "
                f"most, or one; the first is {one_line(name, 200)} ({one_line(reason, 200)}); repair or remove them "
                "(sclkern data check lists all)"
            )
        _log.warning(
            "%s: left out %d of %d samples: %s%s", self.folder.shown(), len(self.defects), samples, named, more
        )

    def _in_split(self) -> np.ndarray:
        if self.split is None:
            return np.ones(self._rows.num_rows, dtype=bool)
        if "split" not in self.schema.names:
            raise UserError(
                f"split: got {self.split!r}, expected none, as {' and '.join(self.suffixes)} files have no splits; "
                "select none (null) and name the tables of each split"
            )
        column = self._rows.column("split")
        if column.null_count == len(column):
            raise UserError(
                f"split: got {self.split!r}, expected none, as {self.files[0]} names no split; select none (null), or "
                "add a column 'split'"
            )
        wanted = pa.array([self.split, *self.split.split("+")])
        return pc.is_in(column, wanted).fill_null(False).to_numpy()

    def _nothing_kept(self) -> UserError:
        files = one_line(", ".join(self.files), 200)
        if self.split is None:
            return UserError(f"{files}: no pair of an image and a caption, expected at least one; correct the tables")
        counts = {str(entry["values"]): entry["counts"] for entry in pc.value_counts(self._rows["split"]).to_pylist()}
        shown = [f"{one_line(name, 60)} ({count})" for name, count in sorted(counts.items())[:_SHOWN]]
        there = ", ".join([*shown, *(["..."] if len(counts) > len(shown) else [])])
        return UserError(f"{files}: no row of split '{self.split}', expected one of the splits there: {there}")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


@dataclass(frozen=True)
class PairNumbers:
    """The pairs of rows of captions: equal captions of one image count once, at the place of the first.

    Attributes:
        pair_image: (num_pairs,) int64, image of each pair.
        pair_group: (num_pairs,) int64, id of each pair's caption text.
        pair_item: (num_pairs,) int32, place of each pair's caption among those of its row.
        image_row: (num_images,) int64, row of each image.
        digest: see ``sclkern.data.digest``.
    """

    pair_image: np.ndarray
    pair_group: np.ndarray
    pair_item: np.ndarray
    image_row: np.ndarray
    digest: str


def number_pairs(
    length: np.ndarray, texts: pa.Array | pa.ChunkedArray, keep_row: np.ndarray, code: np.ndarray | None = None
) -> PairNumbers:
    """Number the pairs of the rows that are kept. Captions become Python objects for the digest alone, some at a time.

    Args:
        length: (rows,) int64, captions of each row.
        texts: captions of all rows, or, with ``code``, the distinct ones.
        keep_row: (rows,) bool.
        code: (captions,) index of each caption among ``texts``.

    Returns:
        The pairs.
    """
    if code is None:
        encoded = texts.combine_chunks().dictionary_encode()
        code, texts = encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary
    row = np.repeat(np.arange(len(length)), length)
    item = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    keep = keep_row[row]
    image_row = np.flatnonzero(keep_row)
    image = np.searchsorted(image_row, row[keep])
    groups, group = np.unique(code[keep], return_inverse=True)
    _, first = np.unique(image * len(groups) + group, return_index=True)
    first.sort()
    pair_image, pair_group = image[first].astype(np.int64), group[first].astype(np.int64)
    distinct = code[keep][first][first_pairs(pair_group)]
    parts = (texts.take(pa.array(distinct[i : i + 65536])) for i in range(0, len(distinct), 65536))
    return PairNumbers(
        pair_image,
        pair_group,
        item[keep][first].astype(np.int32),
        image_row.astype(np.int64),
        digest_pairs(pair_image, pair_group, (text for part in parts for text in part.to_pylist())),
    )
