"""The model of a checkpoint in the formats that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.io import write_atomically
from sclkern.training.directory import SavedRun
from sclkern.training.opening import restore
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
    model, tokenizer = restore(saved)
    if format == "published":
        path, tensors = folder / "model.ckpt", to_reference(model)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                torch.save({"state_dict": tensors}, file)

        write_atomically(path, write)
        return path
    model.save_pretrained(folder)
    CaptionTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
