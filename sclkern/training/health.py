"""Detection of losses, gradients and parameters that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sclkern.errors import UserError
from sclkern.training.sharded import local_part
from sclkern.training.world import World


class FiniteCheck:
    """Remembers on the device whether every loss and gradient norm was finite, so that no step waits for a GPU.

    Args:
        model: whose gradients and parameters are searched for the cause.
        device: device of the losses.
        world: the processes that train together, all of which find the same at the same step; None is this one alone.
    """

    def __init__(self, model: nn.Module, device: torch.device, world: World | None = None) -> None:
        self.model = model
        self.world = world or World()
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def observe(self, *values: Tensor) -> None:
        """Take 0-d tensors of a step into account, without a wait."""
        for value in values:
            self._finite &= torch.isfinite(value)

    def require(
        self,
        step: int,
        saved_step: int,
        values: Mapping[str, Tensor] | None = None,
        batch: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise if anything observed was not finite; this waits for the device.

        Args:
            step: number of the step, for the message.
            saved_step: step of the latest checkpoint, -1 if there is none.
            values: losses of the step by name, to name the one that is not finite.
            batch: the last micro-batch of the step, which is searched first.

        Raises:
            UserError: names the first tensor of the batch, loss, gradient or parameter that is not finite, what is
                kept, and the remedy.
        """
        if self._finite:
            return
        values, batch = values or {}, batch or {}
        tensors = {f"{name} of the batch": value for name, value in batch.items() if isinstance(value, Tensor)}
        causes = self.world.gather(self._first_broken({**tensors, **values}) or "an earlier loss")
        # Gradients are broken everywhere, a loss also where another rank's features are, a batch where it began.
        known = [*tensors, *(name for name in values if name != "grad_norm")]
        rank = min(range(len(causes)), key=lambda r: known.index(causes[r]) if causes[r] in known else len(known))
        remedy = "lower optimizer.learning_rate or set optimizer.max_grad_norm"
        if causes[rank] in tensors:
            remedy = "look at the images of its pairs and at data.transform"
        cause = causes[rank] + (f" on rank {rank}" if self.world.size > 1 else "")
        kept = f"the checkpoint of step {saved_step} is kept" if saved_step >= 0 else "no step was saved"
        raise UserError(f"step {step}: {cause} is not finite; {kept}; {remedy}, then --resume")

    def _first_broken(self, values: Mapping[str, Tensor]) -> str | None:
        for name, value in values.items():
            if not torch.isfinite(value).all():
                return name
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(local_part(parameter.grad)).all():
                return f"the gradient of {name}"
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(local_part(parameter)).all():
                return f"the parameter {name}"
        return None
