"""The model of a checkpoint in the formats that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.errors import UserError
from sclkern.io import write_atomically
from sclkern.model import SCLModel
from sclkern.training.config import build_config
from sclkern.training.directory import SavedRun
from sclkern.weights import to_reference


def export_model(saved: SavedRun, folder: Path, format: Literal["safetensors", "published"]) -> Path:
    """Write the model of a checkpoint.

    Args:
        saved: the checkpoint.
        folder: to write; made where it does not exist.
        format: "safetensors" writes what ``SCLModel.from_pretrained`` reads, with the tokenizer; "published" writes
            ``model.ckpt`` under the published names, for ``SCLModel.from_reference``.

    Returns:
        The file or folder that was written.

    Raises:
        UserError: the checkpoint is of another version, the published code has no such model, or the folder cannot be
            written.
    """
    try:
        # The model of a task is exported as any other.
        config = build_config({name: keys for name, keys in saved.state["config"].items() if name != "task"})
        model = SCLModel(config.model, config.objectives)
        model.load_state_dict(saved.state["model"])
    except (UserError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{saved.path}: is damaged, or not of this version ({reason:.200})") from error
    if format == "published":
        path, tensors = folder / "model.ckpt", to_reference(model)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                torch.save({"state_dict": tensors}, file)

        write_atomically(path, write)
        return path
    model.save_pretrained(folder)
    CaptionTokenizer.from_pretrained(config.data.tokenizer).save_pretrained(folder)
    return folder
