"""Training checkpoints: written whole or not at all, and read without executing code from the file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from sclkern.errors import UserError
from sclkern.io import write_atomically

FORMAT = 1
# What every checkpoint of this format has; later ones have more.
KEYS = ("config", "step", "best", "model", "optimizer", "bad_pictures")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the old file stays intact until the new one is whole.

    Args:
        path: file to write.
        state: tensors and plain values.

    Raises:
        UserError: the directory cannot be written or the disk is full.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch hides the operating system's reason for a failure
            torch.save({"format": FORMAT, **state}, file)

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ``save_checkpoint`` onto the CPU.

    Args:
        path: file to read.

    Returns:
        The state that was written.

    Raises:
        UserError: missing, cut short, damaged, or not a checkpoint of this project.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()  # torch does not compare the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; give the run folder of a started run") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); correct that, or {remedy(path)}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes torch, zipfile and pickle raise whatever they meet
        raise UserError(
            f"{path}: not a whole checkpoint ({type(error).__name__}); it was cut short or is another kind of file; "
            f"{remedy(path)}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a training checkpoint of this version (format {FORMAT} expected); {remedy(path)}")
    if missing := [key for key in KEYS if key not in state]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {remedy(path)}")
    return state


def remedy(path: Path) -> str:
    """What can be done about a checkpoint that cannot be used."""
    best = path.with_name("best.pt")
    if path.name == "latest.pt" and best.exists():
        return f"remove it to go on from {best.name} with --resume, or start in another folder"
    return "start in another folder, with another run.output_dir"
