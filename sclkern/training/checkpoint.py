"""Training checkpoints: written whole or not at all, and read without executing code from the file."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from sclkern.errors import UserError
from sclkern.io import write_atomically
from sclkern.training.config import PretrainConfig, build_config, resume_difference
from sclkern.training.config_yaml import write_yaml

FORMAT = 1


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


def open_directory(config: PretrainConfig, *, resume: bool) -> dict[str, Any] | None:
    """Prepare the run's folder for writing and save the resolved configuration in it.

    Args:
        config: configuration of the run that starts.
        resume: whether a run that is already there goes on.

    Returns:
        The latest checkpoint of the run that is there; None for a new run.

    Raises:
        UserError: the folder cannot be written, holds a run and ``resume`` is False, or holds a run of another
            configuration.
    """
    directory = Path(config.run.output_dir)
    checkpoints = directory / "checkpoints"
    latest = checkpoints / "latest.pt"
    if latest.exists() and not resume:
        raise UserError(
            f"{directory}: already holds a run; add --resume to go on with it, or give another run.output_dir"
        )
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.output_dir {directory}: {error.strerror}; give a folder that can be written") from error
    for left_over in checkpoints.glob(".*.tmp"):  # of a process killed while it wrote
        left_over.unlink(missing_ok=True)
    saved = load_checkpoint(latest) if latest.exists() else None
    if saved:
        # Keys that came later have their defaults in a run that was saved without them.
        before = build_config(saved["config"]).to_dict()
        if difference := resume_difference(before, config.to_dict()):
            raise UserError(f"{latest}: {difference}; resume with the same configuration, or start in another folder")
    resolved = write_yaml(config.to_dict())
    write_atomically(directory / "config.yaml", lambda path: path.write_text(resolved, encoding="utf-8"))
    return saved
