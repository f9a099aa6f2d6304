"""Names of files of data: which are URLs, which lie in a folder, and what a name with braces stands for."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from sclkern.errors import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_TABLES = 1_000_000


def is_url(root: str | Path) -> bool:
    """Whether a root of data is an fsspec URL, such as ``s3://bucket/folder``, and no local path."""
    return isinstance(root, str) and _URL.match(root) is not None


def is_plain(name: str) -> bool:
    """Whether a name, whoever wrote it, can only be that of a file in the folder that it is relative to."""
    outside = name.startswith("/") or _URL.match(name) is not None or ".." in name.split("/")
    return not (outside or "\0" in name or "\\" in name)


def expand_names(table: str) -> list[str]:
    """The names that a table with braces stands for, as ``DataFolder.tables`` describes; a name without is itself.

    Args:
        table: such as ``"{00000..00331}"`` or ``"coco_{train,val}"``.

    Returns:
        The names, in the order of the range or the list.

    Raises:
        UserError: what stands in braces is neither.
    """
    pieces: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(table):
        pieces += [[table[end : match.start()]], _choices(table, match[1])]
        end = match.end()
    pieces.append([table[end:]])
    count = 1
    for piece in pieces:
        count *= len(piece)
    if count > _MOST_TABLES:
        raise UserError(f"tables: {table!r} stands for {count} names, expected {_MOST_TABLES} at most; correct it")
    return ["".join(chosen) for chosen in itertools.product(*pieces)]


def _choices(table: str, content: str) -> list[str]:
    if found := _RANGE.fullmatch(content):
        first, last = int(found[1]), int(found[2])
        if 0 <= last - first < _MOST_TABLES:
            return [str(number).zfill(len(found[1])) for number in range(first, last + 1)]
    elif "," in content:
        return content.split(",")
    raise UserError(
        f"tables: {table!r} has {{{content}}}, expected a rising range such as {{00000..00331}} or a list such as "
        "{train,val}; correct it"
    )
