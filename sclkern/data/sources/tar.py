"""(image, caption) pairs in tar files of WebDataset's naming, such as img2dataset writes, read at any place."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sclkern.data.files import DataFolder
from sclkern.data.index import Index
from sclkern.data.indexed import CAPTION, IndexedPairs
from sclkern.data.source import register_source
from sclkern.data.text import one_line, read_caption
from sclkern.errors import UserError

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
# No caption is so long; a file that says so is refused before it is read.
_LONGEST = {"txt": 1 << 20, "json": 1 << 24}
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_BLOCK = 512
_AGAIN = "download or write it again, or leave it out of the tables"


@register_source("tar", pattern="{table}.tar")
class TarPairs(IndexedPairs):
    """Pairs of tar files: ``KEY.jpg`` (png, webp, ...), its caption in ``KEY.txt`` or as "caption" in ``KEY.json``.

    A key is a path up to the first dot of its last part, as in WebDataset; files of one key may lie anywhere in the
    file. ``KEY.txt`` goes before ``KEY.json``. A sample whose JSON has a "status" other than "success", as img2dataset
    writes for pictures that it did not get, counts as dropped, and so do such rows of the ``.parquet`` file beside.

    Each file is read through an index of its own (see ``open_indices``); nothing is unpacked, and links in a tar are
    not followed. Arguments and attributes are those of ``IndexedPairs``, too; ``split`` must be None.

    Attributes:
        suffixes: of the files.
        schema: columns of the index.

    Raises:
        UserError: as ``IndexedPairs``; or a file is no whole tar, is packed, or has a file twice.
    """

    suffixes = (".tar",)
    schema = pa.schema(
        [
            pa.field("image_id", pa.large_string()),
            pa.field("offset", pa.int64()),
            pa.field("size", pa.int64()),
            CAPTION,
        ]
    )

    def image_bytes(self, image: int) -> bytes:
        """Image ``image`` as the tar holds it; raises ``UserError`` if it cannot be read."""
        file, row = self._place(image)
        return self.folder.read(file, row["offset"], row["size"])

    def image_name(self, image: int) -> str:
        """Where image ``image`` comes from, for messages: ``"00003.tar 000030012"``."""
        file, row = self._place(image)
        return f"{file} {row['image_id']}"

    @staticmethod
    def built_from(folder: DataFolder, name: str) -> list[str]:
        """The tar, and img2dataset's table of its rows where there is one."""
        table = _table_of(name)
        return [name] if folder.info(table) is None else [name, table]

    @staticmethod
    def build(folder: DataFolder, name: str) -> Index:
        """Index a tar."""
        with folder.open(name) as file:
            samples = _read_samples(folder.shown(name), file)
        rows: list[tuple[str, int, int, list[str]]] = []
        index = Index(pa.table([]), Counter(), [])
        for key, sample in samples.items():
            if sample.status not in (None, "success"):
                index.dropped[str(sample.status)] += 1
            elif problem := sample.problem():
                index.defects.append((key, problem))
            elif sample.image is not None and sample.caption is not None:
                rows.append((key, *sample.image, [sample.caption]))
        if folder.info(_table_of(name)) is not None:
            _count_table(folder, _table_of(name), set(samples), index.dropped)
        columns = zip(*rows, strict=True) if rows else [[], [], [], []]
        arrays = [pa.array(list(c), field.type) for c, field in zip(columns, TarPairs.schema, strict=True)]
        return Index(pa.table(arrays, schema=TarPairs.schema), dict(index.dropped), index.defects)


@dataclass
class _Sample:
    """What a tar has of a key: place and size of its image, its caption, its status, what is wrong with it."""

    image: tuple[int, int] | None = None
    caption: str | None = None
    status: str | None = None
    broken: str | None = None
    from_text: bool = False

    def problem(self) -> str | None:
        if self.broken is None and self.image is None:
            return "it has a caption and no picture"
        if self.broken is None and self.caption is None:
            return "it has no caption: neither a .txt file nor a 'caption' in a .json file"
        return self.broken


def _table_of(name: str) -> str:
    return name.removesuffix(".tar") + ".parquet"


def _read_samples(shown: str, file: BinaryIO) -> dict[str, _Sample]:
    """The samples of a tar by their keys, in its order."""
    check_start(shown, file.read(_BLOCK))
    file.seek(0)
    samples: dict[str, _Sample] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # which would hold every header
                name = _printable(member.name)
                folder, _, base = name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not stem or not (member.isreg() or member.islnk() or member.issym()):
                    continue
                if name in seen:
                    raise UserError(f"{shown}: has {one_line(name, 200)} twice, expected every file once; {_AGAIN}")
                seen.add(name)
                if suffix.lower() in (*_IMAGES, *_LONGEST):
                    sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, _Sample())
                    _add(sample, suffix.lower(), member, file)
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(f"{shown}: is no whole tar ({one_line(str(error), 200)}); {_AGAIN}") from error
    check_end(shown, file, end)
    return samples


def _add(sample: _Sample, suffix: str, member: tarfile.TarInfo, file: BinaryIO) -> None:
    """Take a file of a sample; what is wrong with it becomes the sample's ``broken``."""
    if not member.isreg() or member.issparse():
        sample.broken = sample.broken or f"its .{suffix} is a link or has holes, which are not followed"
    elif suffix in _IMAGES:
        if sample.image is not None:
            sample.broken = sample.broken or "it has more than one picture"
        sample.image = (member.offset_data, member.size)
    elif member.size > _LONGEST[suffix]:
        sample.broken = sample.broken or f"its .{suffix} has {member.size} bytes, expected {_LONGEST[suffix]} at most"
    else:
        file.seek(member.offset_data)
        content = file.read(member.size)
        try:
            if suffix == "txt":
                sample.caption, sample.from_text = read_caption(content), True
            else:
                _add_json(sample, content)
        except ValueError as error:
            sample.broken = sample.broken or f"its .{suffix}: {error}"


def _add_json(sample: _Sample, content: bytes) -> None:
    try:
        record = json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"is no JSON in UTF-8 ({one_line(str(error), 100)})") from error
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    status = record.get("status")
    sample.status = status if status is None else one_line(str(status), 100)
    if not sample.from_text and record.get("caption") is not None and sample.status in (None, "success"):
        sample.caption = read_caption(record["caption"])


def _count_table(folder: DataFolder, name: str, keys: set[str], dropped: dict[str, int]) -> None:
    """Count the rows of img2dataset's table that have no sample in the tar."""
    try:
        with folder.open(name) as file:
            table = pq.read_table(file, columns=["key", "status"])
    except (pa.ArrowException, ValueError, OSError):
        return  # a table of something else
    for key, status in zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True):
        if status != "success" and str(key) not in keys:
            reason = one_line(str(status), 100)
            dropped[reason] = dropped.get(reason, 0) + 1


def check_start(shown: str, start: bytes) -> None:
    """Raise a ``UserError`` unless a file begins as a tar that is not packed.

    Args:
        shown: its name, for messages.
        start: its first 512 bytes.
    """
    if not start:
        raise UserError(f"{shown}: is empty, expected a tar; {_AGAIN}")
    for magic, (kind, tool) in _PACKED.items():
        if start.startswith(magic):
            raise UserError(
                f"{shown}: is packed with {kind}, expected a plain tar, because a packed one cannot be read at any "
                f"place; unpack it once: {tool} < {shown} > FILE.tar"
            )
    is_header = start[257:262] == b"ustar" or start[148:156].strip(b" \0").isdigit()
    if len(start) < _BLOCK or (start.strip(b"\0") and not is_header):
        raise UserError(f"{shown}: is no tar, it begins with {start[:16]!r}; {_AGAIN}")


def check_end(shown: str, file: BinaryIO, end: int) -> None:
    """Raise a ``UserError`` unless a tar ends where its last file does.

    It ends with two blocks of zeros; one without was cut short, or has a broken header.

    Args:
        shown: its name, for messages.
        file: the tar.
        end: byte behind its last file.
    """
    file.seek(end)
    mark = file.read(2 * _BLOCK)
    if len(mark) < 2 * _BLOCK or mark.strip(b"\0"):
        broken = f"has a broken header at byte {end}" if len(mark) >= 2 * _BLOCK else "ends without its end mark"
        raise UserError(f"{shown}: {broken}: it was cut short or damaged; {_AGAIN}")
    if file.read(1 << 20).strip(b"\0"):
        raise UserError(
            f"{shown}: goes on after its end mark, as tars do that were put together with cat; split them, or write "
            "them with tar --concatenate"
        )


def _printable(name: str) -> str:
    """A name that can be stored: what is no UTF-8 in it becomes escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
