"""``CompletionLoss``: the contrast of recovered and complete features, with its temperature."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from sclkern import ops
from sclkern.ops.completion_loss import DIRECTIONS, GATHERS, REDUCTIONS
from sclkern.ops.dispatch import BACKENDS


class CompletionLoss(nn.Module):
    """Cosine InfoNCE of two sets of features (Luo et al., SCL, arXiv 2211.13437; see ``sclkern.ops.completion_loss``).

    Without ``learnable`` the ``state_dict`` is empty; with it, it holds the parameter ``temperature``, a scalar.

    Args:
        temperature: what divides the cosines; 0.03 is the published value. With ``learnable`` where it starts.
        learnable: the loss sees the parameter clamped to ``temperature_range``, but the gradient is that of the free
            one: else a temperature that once left the range could never come back.
        temperature_range: (low, high), 0 < low <= high.
        directions: "both", or "recovered_to_complete".
        reduction: "mean", "sum" or "none".
        eps: smallest norm of a feature.
        group, gather: whose features are negatives too, and the scale of their gradient, as in the op.
        backend: "auto", "triton" or "eager".

    Raises:
        ValueError: an option out of range or unknown.
    """

    def __init__(
        self,
        temperature: float = 0.03,
        *,
        learnable: bool = False,
        temperature_range: tuple[float, float] = (0.01, 0.5),
        directions: str = "both",
        reduction: str = "mean",
        eps: float = 1e-8,
        group=None,
        gather: str | None = "exact",
        backend: str = "auto",
    ) -> None:
        low, high = temperature_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"temperature_range: got {temperature_range}, expected 0 < low <= high")
        if not (low <= temperature <= high if learnable else temperature > 0):
            expected = f"a number from {low} to {high}" if learnable else "a positive number"
            raise ValueError(f"temperature: got {temperature}, expected {expected}")
        if not eps > 0:
            raise ValueError(f"eps: got {eps}, expected a positive number")
        for name, option, known in (
            ("directions", directions, DIRECTIONS),
            ("reduction", reduction, REDUCTIONS),
            ("gather", gather, GATHERS),
            ("backend", backend, BACKENDS),
        ):
            if option not in known:
                raise ValueError(f"{name}: got {option!r}, expected one of {', '.join(map(str, known))}")
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(float(temperature))) if learnable else float(temperature)
        self.temperature_range = (low, high)
        self.directions, self.reduction, self.eps = directions, reduction, eps
        self.group, self.gather, self.backend = group, gather, backend

    def forward(self, recovered: Tensor, complete: Tensor, valid: Tensor | None = None) -> Tensor:
        """
        Args:
            recovered, complete: (N, D), or (G, N, D) for G separate contrasts.
            valid: (N,) or (G, N) bool; the other rows take no part.

        Returns:
            Scalar, or the losses of all rows with ``reduction="none"``.
        """
        return ops.completion_loss(
            recovered,
            complete,
            temperature=self.clamped_temperature(),
            directions=self.directions,
            reduction=self.reduction,
            valid=valid,
            eps=self.eps,
            group=self.group,
            gather=self.gather,
            backend=self.backend,
        )

    def clamped_temperature(self) -> float | Tensor:
        """What the loss divides by."""
        if not isinstance(self.temperature, Tensor):
            return self.temperature
        return self.temperature + (self.temperature.clamp(*self.temperature_range) - self.temperature).detach()

    def __deepcopy__(self, memo: dict) -> CompletionLoss:
        # torch cannot copy a process group; the copy has the same.
        memo[id(self.group)] = self.group
        copied = memo[id(self)] = self.__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        if isinstance(self.temperature, Tensor):
            temperature = f"learnable, temperature_range={self.temperature_range}"
        else:
            temperature = f"temperature={self.temperature}"
        return f"{temperature}, directions={self.directions!r}, reduction={self.reduction!r}, gather={self.gather!r}"
