"""Writing files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sclkern.errors import UserError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, flush it to the disk and rename it to ``path``.

    Readers see the old file or the new one, also after a crash. Directories are made as needed. When anything fails
    the temporary file is removed and the old file is as it was.

    Args:
        path: the file to write.
        write: writes the content to the path that it is given.

    Raises:
        UserError: the operating system refused: disk full, read-only, no permission.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        if os.name == "posix":  # Windows cannot open a directory
            sync(path.parent)
    # torch's and safetensors' writers hide the operating system's error in their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        chain = [error, error.__cause__, error.__context__]
        system = next((e for e in chain if isinstance(e, OSError)), None)
        reason = system.strerror if system is not None and system.strerror else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: cannot be written ({reason}); an earlier file of this name is kept; free space, correct the "
            "permissions or choose another directory"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the directory itself cannot be used, and the first error says so
            temporary.unlink(missing_ok=True)


def check_new_folder(path: str | Path) -> None:
    """Raise a ``UserError`` unless ``write_folder`` may make this folder: it is not there, or empty."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a folder to make; give another")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: is not empty, expected a new folder; remove it, or give another")


def write_folder(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary folder beside ``path``, flush its files and rename it to ``path``.

    Args:
        path: the folder to make; not there, or empty. Directories above it are made as needed.
        write: writes the content into the folder that it is given.

    Raises:
        UserError: something is there, or the operating system refused.
    """
    check_new_folder(path)
    path = Path(path).absolute()
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in sorted(temporary.rglob("*")):
            if file.is_file() or os.name == "posix":
                sync(file)
        temporary.rename(path)
        if os.name == "posix":
            sync(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space, correct the permissions or choose "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A name of our own: on a shared disk another machine may have a process of the same number."""
    return path.with_name(f".{path.name}.{os.getpid()}-{platform.node()[:16]}-{secrets.token_hex(4)}.tmp")


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
