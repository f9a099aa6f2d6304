"""The part of a run that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from sclkern.data.undecodable import UndecodableImages, undecodable_limit
from sclkern.errors import UserError
from sclkern.model import SCLModel
from sclkern.training.optim import steps_taken
from sclkern.training.sharded import local_part, read_parts


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
        validated: last step whose validation ended; -1 before the first.
        saved: ``step`` and ``validated`` of the latest checkpoint that is on the disk; (-1, -1) if there is none.
    """

    model: SCLModel
    optimizer: torch.optim.Optimizer
    undecodable: UndecodableImages
    step: int
    best: float
    validated: int
    saved: tuple[int, int]

    def __init__(self, model: SCLModel, optimizer: torch.optim.Optimizer, undecodable: UndecodableImages) -> None:
        self.model = model
        self.optimizer = optimizer
        self.undecodable = undecodable
        self.step = 0
        self.best = float("-inf")
        self.validated = -1
        self.saved = (-1, -1)

    @property
    def saved_step(self) -> int:
        """Step of the latest checkpoint; -1 if there is none."""
        return self.saved[0]

    @property
    def unsaved(self) -> bool:
        """Whether the latest checkpoint lacks a step or a validation."""
        return self.step > 0 and self.saved != (self.step, self.validated)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, under the keys of checkpoint format 1."""
        return {
            "step": self.step,
            "best": self.best,
            "validated": self.validated,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bad_pictures": self.undecodable.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any], parts: Path | None = None) -> None:
        """Continue from a checkpoint; the learning rates stay the configuration's, which may have been lowered.

        Args:
            saved: keys of ``state_dict``.
            parts: folder in which each process finds its parts of the tensors, which ``saved`` lacks; None if it has
                them.

        Raises:
            UserError: values of another model or optimiser, missing, or not finite.
        """
        rates = [group["base_lr"] for group in self.optimizer.param_groups]
        try:
            if parts is not None:
                saved = read_parts(parts, saved, self._places(saved["optimizer"]))
            self.model.load_state_dict(_cut(saved["model"], self.model.state_dict()))
            self.optimizer.load_state_dict(self._cut_moments(saved["optimizer"]))
            # A run that too many stopped goes on when they are repaired; else they are counted again.
            if len(saved["bad_pictures"]["names"]) <= undecodable_limit(self.undecodable.num_images):
                self.undecodable.load_state_dict(saved["bad_pictures"])
            self.step, self.best = int(saved["step"]), float(saved["best"])
            # Checkpoints of before 0.1.0 were written after the validation.
            self.validated = int(saved.get("validated", self.step))
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"is damaged, or not of this model ({type(error).__name__}: {reason:.200})") from error
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["base_lr"] = rate
        self._check_tensors()
        self.saved = (self.step, self.validated)

    def _parameters(self, saved: dict[str, Any]) -> dict[Any, Tensor]:
        """The parameters by their number in an optimiser's state."""
        of_groups = (group["params"] for group in saved["param_groups"])
        ours = (group["params"] for group in self.optimizer.param_groups)
        return dict(zip(chain(*of_groups), chain(*ours), strict=False))

    def _places(self, saved: dict[str, Any]) -> dict[str, Tensor]:
        """What each tensor of a checkpoint is like, by its place there."""
        places = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        parameters = self._parameters(saved)
        moments = [(index, name) for index, entry in saved["state"].items() for name in entry if index in parameters]
        return places | {f"optimizer/state/{index}/{name}": parameters[index].detach() for index, name in moments}

    def _cut_moments(self, saved: dict[str, Any]) -> dict[str, Any]:
        """An optimiser's state with each moment cut as its parameter is."""
        parameters = self._parameters(saved)
        moments = {
            index: _cut(entry, {name: parameters[index] for name in entry if index in parameters})
            for index, entry in saved["state"].items()
        }
        return {**saved, "state": moments}

    def _check_tensors(self) -> None:
        """Raise unless parameters are finite, and the optimiser has moments of their shapes after as many steps."""
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            values = [parameter, *(value for key, value in moments.items() if key != "step")]
            if any(value.shape != parameter.shape or not torch.isfinite(local_part(value)).all() for value in values):
                raise UserError(f"is damaged: {name} or its moments are not finite, or of another shape")
        taken = steps_taken(self.optimizer)
        if taken != self.step or self.best != self.best:
            raise UserError(
                f"is damaged: it is of step {self.step} with a best score of {self.best}, and its optimiser has taken "
                f"{taken} steps"
            )


def _cut(whole: Mapping[str, Any], into: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whole tensors, each cut as the tensor of its name lies in parts in several processes, if that does."""

    def cut(name: str, value: Any) -> Any:
        like = into.get(name)
        if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
            return value
        if isinstance(value, DTensor):
            return value
        # Every process has the whole, so that none sends its own.
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    return {name: cut(name, value) for name, value in whole.items()}
