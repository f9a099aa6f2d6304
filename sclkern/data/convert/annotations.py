"""Reading the annotation files of a set, with errors that name the file."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Collection, Sequence
from typing import Any

from sclkern.data.files import DataFolder
from sclkern.errors import UserError

# What numpy needs to make an array from a pickle; nothing else is called.
_NUMPY = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"), ("_codecs", "encode"),
}  # fmt: skip


def find(folder: DataFolder, names: Sequence[str], what: str, *, optional: bool = False) -> str | None:
    """The first of several names that exists.

    Args:
        folder: the source.
        names: of a file, in order.
        what: what the file is, for the message.
        optional: whether it may be missing.

    Returns:
        The name; None where it is missing.

    Raises:
        UserError: none exists.
    """
    found = next((name for name in names if folder.info(name) is not None), None)
    if found is None and not optional:
        raise UserError(
            f"{folder.shown()}: has no {what}, expected {' or '.join(names)}; download it, or correct SOURCE"
        )
    return found


def read_json(folder: DataFolder, name: str, what: type, expected: str) -> Any:
    """Read a JSON file.

    Args:
        folder: the source.
        name: of the file.
        what: type of its value.
        expected: what it should hold, for the message.

    Returns:
        Its value.

    Raises:
        UserError: it is missing, no JSON, or of another type.
    """
    try:
        value = json.loads(folder.read(name).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder.shown(name)}: is no JSON ({error}), expected {expected}; download it again"
        ) from error
    if not isinstance(value, what):
        raise UserError(
            f"{folder.shown(name)}: holds {type(value).__name__}, expected {expected}; is it the file of this name?"
        )
    return value


def records(folder: DataFolder, name: str, value: Any, keys: Collection[str]) -> list[dict[str, Any]]:
    """A list of objects that have certain keys.

    Args:
        folder: the source.
        name: of the file, for the message.
        value: what should be the list.
        keys: that every object has.

    Returns:
        The list.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, list):
        raise UserError(f"{folder.shown(name)}: holds no list of records with {', '.join(keys)}; is it the right file?")
    for number, record in enumerate(value):
        lacking = [key for key in keys if not isinstance(record, dict) or key not in record]
        if lacking:
            raise UserError(
                f"{folder.shown(name)}: record {number} lacks {', '.join(lacking)}, expected {', '.join(keys)} in "
                "each; is it the right file? download it again"
            )
    return value


def read_text(folder: DataFolder, name: str) -> str:
    """The text of a file in UTF-8.

    Args:
        folder: the source.
        name: of the file.

    Returns:
        The text.

    Raises:
        UserError: it is missing or not in UTF-8.
    """
    try:
        return folder.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{folder.shown(name)}: is not in UTF-8 (byte {error.start}); convert it, such as by iconv -f ISO-8859-1 "
            "-t UTF-8"
        ) from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"it calls {module}.{name}")
        return super().find_class(module, name)


def read_pickle(folder: DataFolder, name: str, expected: str) -> dict[Any, Any]:
    """Read a pickled dict of plain values and numpy arrays; nothing else in it is run.

    Args:
        folder: the source.
        name: of the file.
        expected: what it should hold, for the message.

    Returns:
        The dict.

    Raises:
        UserError: it is missing, broken, or holds anything else.
    """
    content = folder.read(name)
    try:
        value = _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a broken pickle raises errors of every kind
        raise UserError(
            f"{folder.shown(name)}: cannot be read ({error}), expected {expected}, pickled; download it again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{folder.shown(name)}: holds {type(value).__name__}, expected {expected}")
    return value
