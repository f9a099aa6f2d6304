"""Device and initial weights of a run."""

from __future__ import annotations

import torch

from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.training.config import PretrainConfig
from sclkern.training.world import World


def resolve_device(name: str, world: World | None = None) -> torch.device:
    """Turn a device name into a device.

    Args:
        name: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one.
        world: the processes that train together, each on a GPU of its own; None is this one by itself.

    Returns:
        The device.

    Raises:
        UserError: the name is unknown, or the device cannot be used here.
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
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(
            f"device: got {name!r}, but torch sees {torch.cuda.device_count()} GPUs, cuda:0 to "
            f"cuda:{torch.cuda.device_count() - 1}; use one of them"
        )
    if device.type == "cuda" and world is not None and world.size > 1:
        if device.index is not None:
            raise UserError(
                f"device: got {name!r} for {world.size} processes, each of which takes a GPU of its own; use cuda"
            )
        return torch.device("cuda", torch.cuda.current_device())
    return device


def initial_model(config: PretrainConfig) -> SCLModel:
    """The model of a new run: random, or from the weights that the configuration names.

    Args:
        config: configuration of the run.

    Returns:
        The model, on the CPU.

    Raises:
        UserError: the weights cannot be read or do not fit (see ``sclkern.weights``).
    """
    weights, model, objectives = config.weights, config.model, config.objectives
    if weights.reference is not None:
        return SCLModel.from_reference(weights.reference, config=model, strict=weights.strict, objectives=objectives)
    if weights.pretrained is not None:
        return SCLModel.from_pretrained(weights.pretrained, config=model, strict=weights.strict, objectives=objectives)
    if weights.text is not None and weights.vision is not None:
        pair = (weights.text, weights.vision)
        return SCLModel.from_pretrained(pair, config=model, strict=weights.strict, objectives=objectives)
    return SCLModel(model, objectives)
