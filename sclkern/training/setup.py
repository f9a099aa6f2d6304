"""What a run needs before its first step: a device, a tokenizer that fits the model, and initial weights."""

from __future__ import annotations

import torch

from sclkern.data.tokenizer import CaptionTokenizer
from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.training.config import PretrainConfig


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one.

    Raises:
        UserError: not a name of a device, or one that cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: got {name!r}, expected auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: got {name!r}, expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: got {name!r}, but torch sees no GPU; use cpu")
    return device


def check_tokenizer(config: PretrainConfig, tokenizer: CaptionTokenizer) -> None:
    """Raise a ``UserError`` unless vocabulary and special ids are those of the model."""
    for name in ("vocab_size", "pad_id", "mask_id", "bos_id", "eos_id"):
        ours, theirs = getattr(config.model, name), getattr(tokenizer, name)
        if ours != theirs:
            raise UserError(
                f"model.{name}: got {ours}, the tokenizer {config.data.tokenizer!r} has {theirs}; "
                f"set model.{name}={theirs} or use the model's tokenizer"
            )


def initial_model(config: PretrainConfig) -> SCLModel:
    """The model of a new run: random, or from the weights the configuration names (errors of ``sclkern.weights``)."""
    weights = config.weights
    if weights.pretrained is None and weights.reference is None and weights.text is None:
        return SCLModel(config.model, config.objectives)
    common = {"config": config.model, "strict": weights.strict, "objectives": config.objectives}
    if weights.reference is not None:
        return SCLModel.from_reference(weights.reference, **common)
    source = weights.pretrained if weights.pretrained is not None else (weights.text, weights.vision)
    return SCLModel.from_pretrained(source, **common)
