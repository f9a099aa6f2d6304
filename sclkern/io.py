"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import os
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
