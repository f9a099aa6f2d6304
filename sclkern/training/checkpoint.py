"""Training checkpoints: written whole or not at all, read back without running anything of the file's."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from sclkern.errors import UserError
from sclkern.weights.files import write_atomically

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) to ``path``; the old file stays intact until the new one is whole.

    Raises:
        UserError: the directory cannot be written or the disk is full.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch hides the operating system's reason for a failure
            torch.save({"format": FORMAT, **state}, file)

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ``save_checkpoint`` onto the CPU.

    Raises:
        UserError: missing, cut short, or not a checkpoint of this project.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; give the run folder of a started run") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not a whole checkpoint ({type(error).__name__}); it was cut short or is another kind of file; "
            "use another checkpoint of the run"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a training checkpoint of this version (format {FORMAT} expected)")
    return state
