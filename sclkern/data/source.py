"""Sources of (image, caption) pairs: what training, retrieval and reports read, whatever the format on the disk.

A new format is one file, ``sclkern/data/sources/<name>.py``, with a class that satisfies ``PairSource``::

    @register_source("tsv", pattern="{table}.tsv")
    class TsvPairs:
        def __init__(self, root: Path | str, tables: Sequence[str], split: str | None) -> None: ...

``root`` is a local path, or a URL as a str: ``sclkern.data.files.DataFolder`` opens and lists the files of either.

A class outside the package needs no registration: ``data.format=my_package.my_module:MyPairs`` names it.
"""

from __future__ import annotations

import glob
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from sclkern.data.files import DataFolder
from sclkern.data.names import expand_names
from sclkern.data.packed import PackedTexts
from sclkern.data.roots import resolve_root
from sclkern.errors import UserError


class PairSource(Protocol):
    """Images and captions, read in any order.

    Two rules hold for every source. The same files give the same pairs in the same order, because a resumed run counts
    on it. A source can be pickled, because worker processes receive a copy: leave open files out of its state.

    A source may have a ``digest``, a text that changes with the pairs and their captions, by which a resumed run
    notices other data; without one, it is computed from every distinct caption.

    A source may have ``image_ids``, (num_images,) int64, not negative: images of equal ids are the same picture, and no
    negatives of one another. Without them every image is a picture of its own. See ``image_ids``.

    A source may have ``image_bytes(image)``, the encoded file of an image. The loader then decodes it itself, a large
    JPEG at a part of its size (see ``decode_image``); ``image`` must be ``decode_image`` of it.

    Attributes:
        num_images: number of images.
        num_pairs: number of (image, caption) pairs; an image may have several captions.
        pair_image: (num_pairs,) int64, image index of each pair in ``[0, num_images)``, non-decreasing.
        pair_group: (num_pairs,) int64, id of each pair's caption text: equal texts have equal ids. Retrieval counts
            every image with the same caption text as a right answer.
    """

    num_images: int
    num_pairs: int
    pair_image: np.ndarray
    pair_group: np.ndarray

    def caption(self, pair: int) -> str:
        """Caption of a pair: text that is not blank."""

    def image(self, image: int) -> Image.Image:
        """Decoded image of an image index, mode RGB, as of ``decode_image``; after an error the image is skipped."""

    def image_name(self, image: int) -> str:
        """Where an image comes from, for messages: ``"pairs.arrow row 17"``. Names are unique."""


class ClipSource(PairSource, Protocol):
    """A source whose images are clips; ``has_clips`` recognises it by its ``frames``.

    Its ``image`` is the middle frame, for pictures that people look at.
    """

    def frames(self, image: int, choose: Callable[[int], Sequence[int]]) -> list[Image.Image]:
        """Frames of a clip, mode RGB, of one size; ``choose`` gives their ascending indices for the number of frames.

        Raises any error where the clip cannot be decoded.
        """


def has_clips(source: PairSource) -> TypeGuard[ClipSource]:
    """Whether a source is one of clips."""
    return hasattr(source, "frames")


Reader = Callable[[Any, Sequence[str], str | None], PairSource]
_R = TypeVar("_R", bound=Callable[..., PairSource])


@dataclass(frozen=True)
class SourceFormat:
    """A data format that ``open_pairs`` knows.

    Attributes:
        read: opens a source, called with the folder, the names of the tables and the split.
        patterns: glob patterns, relative to the folder, of the files of a table.
        never: patterns of names of files that are no data of this format, although they fit.
    """

    read: Reader
    patterns: tuple[str, ...]
    never: tuple[str, ...] = ()

    def files(self, folder: DataFolder, table: str | None = None) -> list[str]:
        """Find the files of a table.

        Args:
            folder: where to look.
            table: name with or without its suffix, or glob pattern; None is every table.

        Returns:
            Names of the files, sorted.
        """
        patterns = {pattern.format(table=table or "*") for pattern in self.patterns}
        if table is not None and any(fnmatch(table, pattern.format(table="*")) for pattern in self.patterns):
            patterns.add(table)
        found = {name for pattern in patterns for name in folder.glob(pattern)}
        return sorted(name for name in found if not any(fnmatch(name.rpartition("/")[2], one) for one in self.never))


SOURCES: dict[str, SourceFormat] = {}


def register_source(name: str, *, pattern: str | Sequence[str], never: Sequence[str] = ()) -> Callable[[_R], _R]:
    """Decorate the class or function that opens a data format.

    Args:
        name: value of ``data.format``.
        pattern: glob pattern, or several, relative to the folder, of the files of a table, such as
            ``"{table}.arrow"``. A folder that has such files is taken to be of this format when ``data.format`` is
            "auto"; none where only the name of the format selects it.
        never: patterns of names of files that are no data of this format, although they fit.

    Returns:
        The decorator, which returns its argument unchanged.

    Raises:
        ValueError: another format has this name.
    """

    def register(read: _R) -> _R:
        if name in SOURCES:
            raise ValueError(f"name: got {name!r}, which {SOURCES[name].read} has; choose another name")
        SOURCES[name] = SourceFormat(read, (pattern,) if isinstance(pattern, str) else tuple(pattern), tuple(never))
        return read

    return register


def open_pairs(
    root: str | Path, tables: Sequence[str], split: str | None = None, *, format: str = "auto"
) -> PairSource:
    """Open a source of pairs.

    Args:
        root: folder of the data, local or an fsspec URL; ``"demo"`` is the embedded one.
        tables: names of the files or folders below ``root`` to read, without their suffix, in this order; also
            patterns, see ``DataFolder.tables``.
        split: part of the tables to read, such as ``"train"``; None reads all of it.
        format: a name of ``SOURCES``, or ``"module:Class"`` for a reader outside this package; ``"auto"`` looks for
            the files of the tables.

    Returns:
        The source, checked as far as its reader checks it.

    Raises:
        UserError: the format is unknown, several formats or none fit the folder, or the reader refuses the data.
    """
    folder = resolve_root(root)
    if format == "auto":
        format = detect_format(DataFolder(folder), tables)
    if ":" in format:
        return _load_reader(format)(folder, tables, split)
    if format not in SOURCES:
        known = ", ".join(["auto", *SOURCES])
        raise UserError(f"data.format: got {format!r}, expected one of {known}, or module:Class")
    return SOURCES[format].read(folder, tables, split)


def image_ids(source: PairSource, images: ArrayLike | None = None) -> np.ndarray:
    """The pictures that images show.

    Args:
        source: the images.
        images: image indices, of any shape; None stands for all.

    Returns:
        int64 of that shape: the source's ``image_ids``, or the image indices where it has none.
    """
    ids = getattr(source, "image_ids", None)
    if images is None:
        return np.arange(source.num_images) if ids is None else np.asarray(ids, dtype=np.int64)
    indices = np.asarray(images, dtype=np.int64)
    return indices if ids is None else np.asarray(ids[indices], dtype=np.int64)


def index_captions(captions: Sequence[Sequence[str]]) -> tuple[PackedTexts, np.ndarray, np.ndarray]:
    """Number the pairs of a source whose captions fit into memory.

    Args:
        captions: captions of each image; equal captions of one image count once.

    Returns:
        Captions of the pairs, in memory that workers share, ``pair_image`` and ``pair_group``.
    """
    unique = [list(dict.fromkeys(of_image)) for of_image in captions]
    texts = [text for of_image in unique for text in of_image]
    groups = {text: group for group, text in enumerate(dict.fromkeys(texts))}
    pair_image = np.repeat(np.arange(len(unique)), [len(of_image) for of_image in unique])
    return PackedTexts(texts), pair_image, np.array([groups[text] for text in texts], dtype=np.int64)


def detect_format(folder: DataFolder, tables: Sequence[str] = ()) -> str:
    """Find the format of data: the only one that has files of the tables, else the only one that has any file.

    Args:
        folder: of the data.
        tables: names, as ``open_pairs`` takes them.

    Returns:
        A name of ``SOURCES``.

    Raises:
        UserError: several formats or none fit.
    """
    exact = [glob.escape(name) for table in tables for name in (table, *expand_names(table))]
    for names in (exact, [name for table in tables for name in expand_names(table)], [None]):
        fitting = [name for name, known in SOURCES.items() if any(known.files(folder, table) for table in names)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise UserError(
                f"{folder.shown()}: holds data of several formats ({', '.join(fitting)}), expected one; set "
                "data.format to the one to read"
            )
    expected = ", ".join(
        f"{' or '.join(pattern.format(table='*') for pattern in known.patterns)} ({name})"
        for name, known in SOURCES.items()
        if known.patterns
    )
    if not folder.is_dir():
        raise UserError(f"{folder.shown()}: no such folder, expected one with {expected}; correct data.root")
    raise UserError(
        f"{folder.shown()}: no data of a known format, expected {expected}; correct data.root or set data.format"
    )


def _load_reader(path: str) -> Reader:
    """The class or function that ``"module:name"`` stands for."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"data.format: {path!r} cannot be imported ({error}), expected module:Class; put the module's folder on "
            "PYTHONPATH, or correct the name"
        ) from error
