"""Clips with captions: video files, folders of frames, or frames in an arrow file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from sclkern.data.files import DataFolder
from sclkern.data.frames import frames_of_one_size, middle, read_frames
from sclkern.data.images import decode_image
from sclkern.data.index import Index
from sclkern.data.source import PairSource, register_source
from sclkern.data.sources.arrow import ArrowPairs
from sclkern.data.sources.records import RecordPairs, any_there, index_records, record_schema
from sclkern.errors import UserError

Choose = Callable[[int], Sequence[int]]
Content = str | list[bytes]


class Clips:
    """Clips of the rows of a reader: a source whose images are clips.

    Args:
        rows: names and captions of the clips.
        content: gives the path of the file or folder of a clip, or its encoded frames.
        folder: of the files.

    Attributes:
        num_images: number of clips.
        num_pairs: number of (clip, caption) pairs.
        pair_image: (num_pairs,) int64, clip of each pair, non-decreasing.
        pair_group: (num_pairs,) int64, id of each pair's caption text.
        digest: of the pairs and their captions, see ``sclkern.data.digest``.
        image_ids: (num_images,) int64, equal for rows of the same file.
        defects: name and reason of each sample of a table that was left out.
    """

    num_images: int
    num_pairs: int
    pair_image: np.ndarray
    pair_group: np.ndarray
    digest: str
    image_ids: np.ndarray
    defects: list[tuple[str, str]]

    def __init__(self, rows: ArrowPairs | RecordPairs, content: Callable[[int], Content], folder: DataFolder) -> None:
        self._rows, self._content, self._folder = rows, content, folder
        self.num_images, self.num_pairs = rows.num_images, rows.num_pairs
        self.pair_image, self.pair_group = rows.pair_image, rows.pair_group
        self.digest = rows.digest
        self.defects = rows.defects if isinstance(rows, RecordPairs) else []
        if isinstance(rows, RecordPairs):
            self.image_ids = rows.image_ids

    def frames(self, image: int, choose: Choose) -> list[Image.Image]:
        """Frames of a clip, as of ``read_frames``; raises ``ValueError`` if it cannot be decoded."""
        content = self._content(image)
        if isinstance(content, str):
            return read_frames(self._folder, content, choose)
        if not content:
            raise ValueError("the clip has no frame")
        wanted = choose(len(content))
        decoded = {index: decode_image(content[index]) for index in wanted}
        return frames_of_one_size([decoded[index] for index in wanted])

    def image(self, image: int) -> Image.Image:
        """The middle frame of a clip; raises ``ValueError`` if it cannot be decoded."""
        return self.frames(image, middle)[0]

    def column(self, name: str) -> pa.ChunkedArray | None:
        """Values of a column for each clip, such as ``split`` or ``image_id``; None without it."""
        return self._rows.column(name)

    def image_name(self, image: int) -> str:
        """Where a clip comes from, for messages: ``"msrvtt_train.arrow row 17 (video17)"``."""
        return self._rows.image_name(image)

    def caption(self, pair: int) -> str:
        """Caption of a pair."""
        return self._rows.caption(pair)


class _FileRows(ArrowPairs):
    _content = ("video", pa.string())

    def content(self, image: int) -> Content:
        return str(self._value(image).as_py())


class _FrameRows(ArrowPairs):
    _content = ("frames", pa.list_(pa.binary()))

    def content(self, image: int) -> Content:
        frames: list[bytes] = self._value(image).as_py()
        return frames


class _RecordRows(RecordPairs):
    schema = record_schema("clip")

    @staticmethod
    def build(folder: DataFolder, name: str) -> Index:
        return index_records(folder, name, _RecordRows.schema, folders=True)

    @staticmethod
    def is_there(folder: DataFolder, name: str, paths: Sequence[str]) -> bool:
        return any_there(folder, name, paths, folders=True)


@register_source("arrow", pattern="{table}.arrow")
def open_arrow(root: Path | str, tables: Sequence[str], split: str | None = None) -> PairSource:
    """Open arrow files: of images (``ArrowPairs``), or of clips.

    A file of clips has, in place of ``image``, a column ``video`` (string: path of a video file, or of a folder of
    frames, relative to ``root``) or ``frames`` (list of binary: encoded images). The other columns are those of images.

    Args:
        root: folder of the files, or an fsspec URL.
        tables: names without ``.arrow``, in order; also patterns.
        split: value of the ``split`` column to keep; None keeps every row.

    Returns:
        The source.

    Raises:
        UserError: as ``ArrowPairs``.
    """
    folder = DataFolder(root)
    names = folder.tables(tables, [".arrow"])
    columns = _columns(folder, names[0])
    for rows in (_FileRows, _FrameRows):
        if rows._content[0] in columns and "image" not in columns:
            opened = rows(root, tables, split)
            return Clips(opened, opened.content, folder)
    return ArrowPairs(root, tables, split)


def _columns(folder: DataFolder, name: str) -> list[str]:
    """Columns of an arrow file; none where it cannot be read, which its reader says better."""
    try:
        names: list[str] = pa.ipc.open_file(pa.memory_map(str(folder.local_copy(name)))).schema.names
        return names
    except (pa.ArrowException, OSError, UserError):
        return []


@register_source("clips", pattern=())
def open_clips(
    root: Path | str, tables: Sequence[str], split: str | None = None, *, lenient: bool = False
) -> PairSource:
    """Open tables of JSON, JSON lines, CSV or TSV that name clips, as those of ``RecordPairs`` name pictures.

    A clip is a video file, or a folder of frames. ``data.format=clips`` selects this reader: a table does not say what
    its files are.

    Args:
        root: folder of tables and clips, or an fsspec URL.
        tables: names of the tables without their suffix.
        split: value of the split to keep, or several joined by "+"; None keeps every row.
        lenient: see ``IndexedPairs``.

    Returns:
        The source.

    Raises:
        UserError: as ``RecordPairs``.
    """
    rows = _RecordRows(root, tables, split, lenient=lenient)
    return Clips(rows, rows.path, rows.folder)
