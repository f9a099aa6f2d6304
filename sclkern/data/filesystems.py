"""File systems behind URLs, and regular files of the local one."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

import fsspec

from sclkern.data.text import one_line
from sclkern.errors import UserError

# What file systems call the version of a file, the surest first.
_STAMPS = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "updated")


def open_filesystem(root: str) -> tuple[Any, str]:
    """The file system of a URL.

    Args:
        root: the URL.

    Returns:
        The file system, and the path there.

    Raises:
        UserError: its protocol is unknown or needs a package that is not installed, or it cannot be opened.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(root)
        return filesystem, path
    except ImportError as error:
        raise UserError(
            f"data.root: {one_line(root, 200)!r} needs a package that is not installed ({one_line(str(error), 200)}); "
            "install it, or copy the folder to a local disk"
        ) from error
    except Exception as error:  # of an unknown protocol, a missing host, credentials
        raise UserError(
            f"data.root: {one_line(root, 200)!r} cannot be opened ({one_line(str(error), 200)}), expected a local "
            "folder or a URL of fsspec; correct it"
        ) from error


def version(filesystem: Any, path: str, found: dict[str, Any]) -> str:
    """Text that changes when a file is written again.

    Args:
        filesystem: of the file.
        path: of the file there.
        found: what the file system says of it.

    Returns:
        The text; empty where the file system knows none.
    """
    stamp = next((str(found[key]) for key in _STAMPS if found.get(key)), None)
    if stamp is not None:
        return stamp
    try:
        return str(filesystem.modified(path))
    except (NotImplementedError, KeyError):
        return ""


def open_file(path: str, flags: int) -> int:
    """Open a file, and no pipe or device, for which a reader would wait; an ``opener`` of ``open``.

    Args:
        path: of the file.
        flags: of ``os.open``.

    Returns:
        The descriptor.

    Raises:
        OSError: there is no such file, or it is none.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return descriptor


def read_exactly(file: Any, length: int) -> bytes:
    """Read as many bytes as there are, up to ``length``; as a rule one system call gives them all."""
    parts: list[bytes] = []
    while length and (part := file.read(length)):
        parts.append(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
