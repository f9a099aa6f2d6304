"""Detection of losses, gradients and parameters that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sclkern.errors import UserError


class FiniteCheck:
    """Remembers on the device whether every loss and gradient norm was finite, so that no step waits for a GPU.

    Args:
        model: whose gradients and parameters are searched for the cause.
        device: device of the losses.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def observe(self, *values: Tensor) -> None:
        """Take 0-d tensors of a step into account, without a wait."""
        for value in values:
            self._finite &= torch.isfinite(value)

    def require(self, step: int, saved_step: int, values: Mapping[str, Tensor] | None = None) -> None:
        """Raise if anything observed was not finite; this waits for the device.

        Args:
            step: number of the step, for the message.
            saved_step: step of the latest checkpoint, -1 if there is none.
            values: losses of the step by name, to name the one that is not finite.

        Raises:
            UserError: names the first loss, gradient or parameter that is not finite, what is kept, and the remedy.
        """
        if self._finite:
            return
        cause = self._first_broken(values or {}) or "an earlier loss"
        kept = f"the checkpoint of step {saved_step} is kept; " if saved_step >= 0 else "no step was saved; "
        raise UserError(
            f"step {step}: {cause} is not finite; {kept}lower optimizer.learning_rate or set optimizer.max_grad_norm, "
            "then --resume"
        )

    def _first_broken(self, values: Mapping[str, Tensor]) -> str | None:
        for name, value in values.items():
            if not torch.isfinite(value):
                return name
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return f"the gradient of {name}"
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the parameter {name}"
        return None
