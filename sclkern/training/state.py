"""The part of a run that a checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch

from sclkern.data.undecodable import UndecodableImages
from sclkern.model import SCLModel


class TrainingState:
    """Model, optimiser and counters of a run.

    Everything random is a function of (seed, step), so there is no generator state.

    Args:
        model: the model, on its device.
        optimizer: its optimiser; each parameter group has a ``base_lr``.
        undecodable: counts the training images that cannot be decoded.

    Attributes:
        model: the model.
        optimizer: its optimiser.
        undecodable: undecodable training images so far.
        step: optimiser steps taken.
        best: largest recall sum of a validation so far; -inf before the first.
        saved_step: step of the latest checkpoint; -1 if there is none.
    """

    model: SCLModel
    optimizer: torch.optim.Optimizer
    undecodable: UndecodableImages
    step: int
    best: float
    saved_step: int

    def __init__(self, model: SCLModel, optimizer: torch.optim.Optimizer, undecodable: UndecodableImages) -> None:
        self.model = model
        self.optimizer = optimizer
        self.undecodable = undecodable
        self.step = 0
        self.best = float("-inf")
        self.saved_step = -1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, under the keys of checkpoint format 1."""
        return {
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bad_pictures": self.undecodable.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint; the learning rates stay the configuration's, which may have been lowered."""
        rates = [group["base_lr"] for group in self.optimizer.param_groups]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["base_lr"] = rate
        self.undecodable.load_state_dict(saved["bad_pictures"])
        self.step, self.best = saved["step"], saved["best"]
        self.saved_step = self.step
