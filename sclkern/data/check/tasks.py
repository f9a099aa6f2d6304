"""Arrow files of VQA and NLVR2 for an examination: pictures with questions, where training reads captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from sclkern.data.files import DataFolder
from sclkern.data.images import decode_image
from sclkern.data.source import index_captions
from sclkern.data.sources.arrow import read_batches
from sclkern.errors import UserError

_PICTURES = ("image", "image_0", "image_1")
_IDS = {"image_id": ("image_id", "identifier")}


class TaskPictures:
    """Pictures of the columns image, or image_0 and image_1, each with the row's ``questions``: a ``PairSource``.

    Args:
        root: folder of the files, local or an fsspec URL.
        tables: names of the files.

    Attributes:
        num_images: pictures.
        num_pairs: pairs of a picture and a question.
        pair_image: (num_pairs,) int64, picture of each pair.
        pair_group: (num_pairs,) int64, id of each pair's question.

    Raises:
        UserError: a file cannot be read, or has no such columns.
    """

    num_images: int
    num_pairs: int
    pair_image: np.ndarray
    pair_group: np.ndarray

    def __init__(self, root: Path | str, tables: Sequence[str]) -> None:
        folder = DataFolder(root)
        self._places: list[tuple[pa.RecordBatch, int, str, str]] = []
        questions: list[list[str]] = []
        for name in folder.tables(tables, [".arrow"]):
            row = 0
            for batch in read_batches(folder.local_copy(name)):
                pictures = [column for column in _PICTURES if column in batch.schema.names]
                if not pictures or "questions" not in batch.schema.names:
                    raise UserError(f"{folder.shown(name)}: has {batch.schema.names}, expected pictures and questions")
                for local, texts in enumerate(batch.column("questions").to_pylist()):
                    for column in pictures:
                        suffix = "" if column == "image" else f" {column}"
                        self._places.append((batch, local, column, f"{name} row {row + local}{suffix}"))
                        questions.append([str(text) for text in texts or ()])
                row += batch.num_rows
        self._questions, self.pair_image, self.pair_group = index_captions(questions)
        self.num_images, self.num_pairs = len(self._places), len(self._questions)

    def image_bytes(self, image: int) -> bytes:
        """Picture ``image`` as the file holds it; raises ``ValueError`` if there is none."""
        batch, row, column, _ = self._places[image]
        content: bytes | None = batch.column(column)[row].as_py()
        if content is None:
            raise ValueError("there is no image (null)")
        return content

    def image(self, image: int) -> Image.Image:
        """Picture ``image``, decoded to mode RGB."""
        return decode_image(self.image_bytes(image))

    def image_name(self, image: int) -> str:
        """Where picture ``image`` comes from: ``"nlvr2_dev.arrow row 17 image_0"``."""
        return self._places[image][3]

    def caption(self, pair: int) -> str:
        """The question of ``pair``."""
        return self._questions[pair]

    def column(self, name: str) -> pa.ChunkedArray | None:
        """Values of ``split`` or ``image_id`` for each picture; null where a file has none.

        Args:
            name: of the column.

        Returns:
            (num_images,) texts.
        """
        values = []
        for batch, row, _, _ in self._places:
            there = next((known for known in _IDS.get(name, (name,)) if known in batch.schema.names), None)
            value = None if there is None else batch.column(there)[row].as_py()
            values.append(None if value is None else str(value))
        return pa.chunked_array([pa.array(values, pa.large_string())])
