"""Detection of losses, gradients and parameters that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sclkern.errors import UserError
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
        causes = self.world.gather(self._first_broken(values or {}) or "an earlier loss")
        # The sum of gradients is broken everywhere, the loss only where it began.
        rank = next((rank for rank, cause in enumerate(causes) if cause in (values or {}) and cause != "grad_norm"), 0)
        cause = causes[rank] + (f" on rank {rank}" if self.world.size > 1 else "")
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
            if parameter.grad is not None and not torch.isfinite(_own(parameter.grad)).all():
                return f"the gradient of {name}"
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(_own(parameter)).all():
                return f"the parameter {name}"
        return None


def _own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may lie in parts in several."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
