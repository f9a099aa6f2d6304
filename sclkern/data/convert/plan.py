"""What a conversion is going to write: tables of rows, and whatever of the source does not come into them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from sclkern.data.files import DataFolder
from sclkern.data.names import is_plain
from sclkern.data.text import one_line

# Names of files that a card lists for each reason; the rest is counted.
_NAMED = 200


@dataclass(frozen=True)
class Options:
    """How a set is converted.

    Attributes:
        resize: short side in pixels to which larger pictures are shrunk; None leaves every file as it is.
        frames: frames to write of each clip; None writes the name of its file.
        allow_missing: whether any share of files may be missing.
        without_tests_of: ``coco`` and ``flickr30k``, each with ``=FILE`` where its file lies elsewhere.
        answers: "official" or "published", how VQA's answers are looked up.
        seed: of the draw of VQA's rest_val.
        rest_val: pictures of VQA's rest_val.
    """

    resize: int | None = None
    frames: int | None = None
    allow_missing: bool = False
    without_tests_of: tuple[str, ...] = ()
    answers: str = "official"
    seed: int = 0
    rest_val: int = 1000


class Row(NamedTuple):
    """A row before its files are read.

    Attributes:
        files: of the source, one for each column of pictures or clips; a file in a tar is a ``Member``.
        values: of the other columns.
    """

    files: tuple[str | Member, ...]
    values: tuple[Any, ...]


class Member(NamedTuple):
    """A file in an uncompressed tar.

    Attributes:
        tar: name of the tar.
        name: of the file in it.
        start: its first byte in the tar.
        length: its bytes.
    """

    tar: str
    name: str
    start: int
    length: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


@dataclass
class Table:
    """An arrow file.

    Attributes:
        name: of the file, without ``.arrow``.
        columns: the columns that ``Row.values`` fills.
        rows: its rows.
        pictures: names of the columns that ``Row.files`` fills.
        clips: whether the files are clips.
    """

    name: str
    columns: pa.Schema
    rows: list[Row]
    pictures: tuple[str, ...] = ("image",)
    clips: bool = False

    def fingerprint(self, options: Options) -> str:
        """A text that changes with the rows and with the options that change bytes."""
        hashed = hashlib.blake2b(digest_size=16)
        head = (1, self.name, self.pictures, self.clips, str(self.columns), options.resize, options.frames)
        hashed.update(repr(head).encode())
        for row in self.rows:
            hashed.update(repr((row.files, row.values)).encode("utf-8", "surrogatepass"))
        return hashed.hexdigest()


@dataclass
class Findings:
    """Counts by reason, with the first names of each."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str = "", count: int = 1) -> None:
        """Count a file or record.

        Args:
            reason: why it is not in a table.
            name: what it is called; empty where it has no name.
            count: how many there are.
        """
        self.counts[reason] = self.counts.get(reason, 0) + count
        names = self.names.setdefault(reason, [])
        if name and len(names) < _NAMED:
            names.append(one_line(name, 200))

    @property
    def total(self) -> int:
        """All that was counted."""
        return sum(self.counts.values())

    def report(self) -> dict[str, Any]:
        """For the card."""
        return {reason: {"count": count, "names": self.names[reason]} for reason, count in self.counts.items()}


@dataclass
class Plan:
    """All that a conversion is going to do.

    Attributes:
        tables: to write, in this order.
        found: what the source holds, by name.
        missing: files that the source names and does not have.
        dropped: records and captions that are left out, by reason.
        notes: lines for the card.
        known_for_losses: whether the set is known for missing and broken files, which then are no error.
        extra: further files to write, such as a list of answers, by name.
    """

    tables: list[Table] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)
    missing: Findings = field(default_factory=Findings)
    dropped: Findings = field(default_factory=Findings)
    notes: list[str] = field(default_factory=list)
    known_for_losses: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, number: int = 1) -> None:
        """Add to what was found."""
        self.found[name] = self.found.get(name, 0) + number

    def captions(self, texts: Iterable[Any], name: str) -> list[str]:
        """The captions that can be used; others are counted.

        Args:
            texts: as they stand in the source.
            name: of their picture.

        Returns:
            Texts that are not blank, as they are.
        """
        kept = []
        for text in texts:
            if isinstance(text, str) and text.strip():
                kept.append(text)
            else:
                self.dropped.add("captions without text", name)
        return kept


class Listing:
    """Names of the files in a source; a folder is listed once, as asking for each file takes long over a network.

    Args:
        folder: the source.
    """

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder
        self._names: dict[str, set[str]] = {}

    def names(self, folder: str) -> set[str]:
        """Names of the files in a folder; empty where there is none."""
        if folder not in self._names:
            self._names[folder] = self.folder.names_in(folder)
        return self._names[folder]

    def has(self, name: str) -> bool:
        """Whether there is such a file; a name that leads out of the source is that of none."""
        folder, _, last = name.rpartition("/")
        return is_plain(name) and last in self.names(folder)


STRINGS = pa.list_(pa.string())
# Columns of pictures with captions, behind the picture.
CAPTIONED = pa.schema([("caption", STRINGS), ("image_id", pa.string()), ("split", pa.string())])


def split_rows(name: str, rows: Sequence[Row], size: int, columns: pa.Schema = CAPTIONED) -> list[Table]:
    """Tables ``name_0``, ``name_1`` and so on.

    Args:
        name: what their names begin with.
        rows: of all tables.
        size: rows of each table.
        columns: of the tables.

    Returns:
        The tables; none without rows.
    """
    starts = range(0, len(rows), size)
    return [Table(f"{name}_{start // size}", columns, list(rows[start : start + size])) for start in starts]
