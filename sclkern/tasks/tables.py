"""Tables of questions on pictures, as ``sclkern data convert`` writes them: each row has pictures and several texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from sclkern.data.files import DataFolder
from sclkern.data.images import decode_image
from sclkern.data.roots import resolve_root
from sclkern.data.sources.arrow import read_batches
from sclkern.errors import UserError


class QuestionTable:
    """Samples of one text and the pictures of its row, over one or more memory-mapped arrow files.

    Args:
        root: folder of the files, or an fsspec URL.
        tables: names of the files without ``.arrow``, in order; also patterns, see ``DataFolder.tables``.
        pictures: columns of the pictures, binary.
        columns: further columns that must be there.
        set: that ``sclkern data convert`` makes the files of, for messages.

    Attributes:
        root: as given.
        num_samples: number of texts.
        num_images: number of pictures.
        digest: of the texts and everything that is asked of them.

    Raises:
        UserError: a file is missing or no arrow file, a column is missing, or no row is there.
    """

    root: str | Path
    num_samples: int
    num_images: int
    digest: str

    def __init__(
        self,
        root: str | Path,
        tables: Sequence[str],
        *,
        pictures: Sequence[str] = ("image",),
        columns: Sequence[str] = (),
        set: str,
    ) -> None:
        self.root, self._pictures, self._set = root, tuple(pictures), set
        folder = DataFolder(resolve_root(root))
        names = folder.tables(tables, [".arrow"])
        if missing := [name for name in names if folder.info(name) is None]:
            there = ", ".join(sorted(name.removesuffix(".arrow") for name in folder.glob("*.arrow"))) or "none"
            raise UserError(
                f"{folder.shown(missing[0])}: no such table, expected one of {set}; the tables there: {there}; "
                f"sclkern data convert {set} writes them"
            )
        self._paths = [folder.local_copy(name) for name in names]
        self._columns = ("questions", *columns)
        self._open()
        self._index()

    @property
    def names(self) -> str:
        """The files, for messages."""
        return ", ".join(path.name for path in self._paths)

    def text(self, sample: int) -> str:
        """The question or sentence of a sample."""
        return str(self.item("questions", sample))

    def item(self, column: str, sample: int) -> Any:
        """What a column of lists has for a sample; None where its row has an empty list there."""
        batch, row = self._locate(int(self._sample_row[sample]))
        items = self._batches[batch].column(column)[row].as_py()
        return items[int(self._sample_item[sample])] if items else None

    def of_row(self, column: str, sample: int) -> Any:
        """What a column has for the row of a sample."""
        batch, row = self._locate(int(self._sample_row[sample]))
        return self._batches[batch].column(column)[row].as_py()

    def images_of(self, sample: int) -> tuple[int, ...]:
        """The pictures of a sample, in the order of the columns."""
        first = int(self._sample_row[sample]) * len(self._pictures)
        return tuple(range(first, first + len(self._pictures)))

    def image_bytes(self, image: int) -> memoryview:
        """A picture as encoded in its file; raises ``ValueError`` if there is none."""
        row, side = divmod(image, len(self._pictures))
        batch, local = self._locate(row)
        value = self._batches[batch].column(self._pictures[side])[local]
        if not value.is_valid:
            raise ValueError("there is no image (null)")
        return memoryview(value.as_buffer())

    def image(self, image: int) -> Image.Image:
        """A picture, decoded to mode RGB; raises ``ValueError`` if it cannot be decoded."""
        return decode_image(self.image_bytes(image))

    def image_name(self, image: int) -> str:
        """Where a picture comes from, for messages: ``"nlvr2_dev.arrow row 17 (image_1)"``."""
        row, side = divmod(image, len(self._pictures))
        batch, local = self._locate(row)
        file, first = self._file_row[batch]
        column = f" ({self._pictures[side]})" if len(self._pictures) > 1 else ""
        return f"{self._paths[file].name} row {first + local}{column}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_batches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._file_row: list[tuple[int, int]] = []
        for file, path in enumerate(self._paths):
            row = 0
            for batch in read_batches(path):
                self._batches.append(batch)
                self._file_row.append((file, row))
                row += batch.num_rows
        self._start = np.cumsum([0] + [batch.num_rows for batch in self._batches])[:-1]

    def _index(self) -> None:
        hashed = hashlib.blake2b(digest_size=16)
        lengths = [np.zeros(0, dtype=np.int64)]
        for number, batch in enumerate(self._batches):
            if lacking := [name for name in (*self._pictures, *self._columns) if name not in batch.schema.names]:
                raise UserError(
                    f"{self._paths[self._file_row[number][0]].name}: no column {lacking[0]!r} (there are "
                    f"{', '.join(batch.schema.names)}), expected a table of {self._set}; sclkern data convert "
                    f"{self._set} writes them"
                )
            lengths.append(pc.list_value_length(batch.column("questions")).to_numpy(zero_copy_only=False))
            for name in self._columns:
                hashed.update(json.dumps(batch.column(name).to_pylist()).encode("utf-8", "surrogatepass"))
        length = np.concatenate(lengths).astype(np.int64)
        self._sample_row = np.repeat(np.arange(len(length)), length)
        self._sample_item = np.arange(len(self._sample_row)) - np.repeat(np.cumsum(length) - length, length)
        self.num_samples, self.num_images = len(self._sample_row), len(length) * len(self._pictures)
        self.digest = hashed.hexdigest()
        if not self.num_samples:
            raise UserError(f"{self.names}: no question, expected one or more; convert the set again")

    def _locate(self, row: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._start, row, side="right")) - 1
        return batch, row - int(self._start[batch])
