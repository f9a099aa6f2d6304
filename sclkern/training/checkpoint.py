"""Training checkpoints: written whole or not at all, and read without executing code from the file."""

from __future__ import annotations

import errno
import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sclkern.errors import UserError
from sclkern.io import write_atomically

FORMAT = 1
# What every checkpoint of this format has; later ones have more.
KEYS = ("config", "step", "best", "model", "optimizer", "bad_pictures")


class DamagedError(UserError):
    """A checkpoint that was cut short, or whose bytes changed since it was written."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint with a digest of its content; the old file stays intact until the new one is whole.

    Args:
        path: file to write.
        state: tensors of the CPU and plain values.

    Raises:
        UserError: the directory cannot be written or the disk is full.
    """
    content = {**state, "format": FORMAT, "digest": content_digest(state)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch hides the operating system's reason for a failure
            torch.save(content, file)

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ``save_checkpoint`` onto the CPU.

    Args:
        path: file to read.

    Returns:
        The state that was written, and ``format``.

    Raises:
        DamagedError: cut short, damaged, or not a checkpoint.
        UserError: missing, cannot be read, or a checkpoint of something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        digest = state.pop("digest", None) if isinstance(state, dict) else None
        if digest is None:  # of a version that wrote none
            with zipfile.ZipFile(path) as parts:
                damaged = parts.testzip()  # torch does not compare the checksums
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        elif digest != content_digest(state):
            raise zipfile.BadZipFile("its content has another digest than when it was written")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; give the run folder of a started run") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes torch, zipfile and pickle raise whatever they meet
        # Those that seek to a place that is not there get EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(
                f"{path}: cannot be read ({error.strerror or error}); correct that, or {remedy(path)}"
            ) from error
        raise DamagedError(
            f"{path}: not a whole checkpoint ({type(error).__name__}); it was cut short or is another kind of file; "
            f"{remedy(path)}"
        ) from error
    check_keys(path, state)
    return state


def check_keys(path: Path, state: Any) -> None:
    """Raise a ``UserError`` unless this is the content of a training checkpoint of this format."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a training checkpoint of this version (format {FORMAT} expected); {remedy(path)}")
    if missing := [key for key in KEYS if key not in state]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {remedy(path)}")


def content_digest(state: dict[str, Any]) -> str:
    """Compute a digest of everything in a checkpoint but its format, the same before it is written and after.

    Args:
        state: nested dicts, lists and tuples of tensors of the CPU and plain values.

    Returns:
        SHA-256, in hexadecimal digits.
    """
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            hashed.update(f"{value.dtype} {tuple(value.shape)};".encode())
            if value.numel():
                hashed.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            hashed.update(f"dict {len(value)};".encode())
            for key, entry in value.items():
                hashed.update(f"{key!r}:".encode())
                add(entry)
        elif isinstance(value, (list, tuple)):
            hashed.update(f"{type(value).__name__} {len(value)};".encode())
            for entry in value:
                add(entry)
        else:
            hashed.update(f"{value!r};".encode())

    add({key: value for key, value in state.items() if key not in ("format", "digest")})
    return hashed.hexdigest()


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, in the order in which a run goes on from them: the newest first, ``best.pt`` last."""
    named = [folder / "latest.pt", *kept_steps(folder), folder / "best.pt", *best_folders(folder)]
    return [path for path in named if path.exists()]


def kept_steps(folder: Path) -> list[Path]:
    """The checkpoints ``step-<step>`` of a folder, newest first."""
    return _of_steps(folder, r"step-(\d+)(\.pt)?")


def best_folders(folder: Path) -> list[Path]:
    """The checkpoints ``best-<step>`` of a folder, newest first; there may be files of the user's beside them."""
    return _of_steps(folder, r"best-(\d+)")


def _of_steps(folder: Path, pattern: str) -> list[Path]:
    named = [(path, re.fullmatch(pattern, path.name)) for path in folder.glob("*-*")]
    steps = {path: int(found[1]) for path, found in named if found}
    return sorted(steps, key=lambda path: (steps[path], path.name), reverse=True)


def remedy(path: Path) -> str:
    """What can be done about a checkpoint that cannot be used."""
    others = checkpoints_of(path.parent)
    if path in others[:-1]:
        return (
            f"remove it to go on from {others[others.index(path) + 1].name} with --resume, or start in another folder"
        )
    return "start in another folder, with another run.output_dir"
