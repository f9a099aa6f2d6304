"""``CompletionLoss``: the contrast of recovered and complete features, with its temperature."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sclkern import ops
from sclkern.ops.completion_loss import DIRECTIONS, GATHERS, REDUCTIONS
from sclkern.ops.dispatch import BACKENDS


class CompletionLoss(nn.Module):
    """InfoNCE of two sets of features (Luo et al., SCL, arXiv 2211.13437; see ``sclkern.ops.completion_loss``).

    Without ``learnable`` the ``state_dict`` is empty; with it, it holds the parameter ``temperature``, a scalar.

    Args:
        temperature: divisor of the similarities, its initial value with ``learnable``; the published value is 0.03.
        learnable: make the temperature a parameter. The loss sees it clamped to ``temperature_range``; its gradient
            is that of the unclamped value, so that a temperature that has left the range can return.
        temperature_range: (low, high), 0 < low <= high.
        directions: "both", or "recovered_to_complete".
        reduction: "mean", "sum" or "none".
        normalize: whether similarities are cosines; otherwise they are dot products.
        eps: smallest norm of a feature vector, where they are normalised.
        group: process group whose ranks contribute negatives, as in the op.
        gather: how features and gradients cross the ranks, as in the op.
        backend: "auto", "triton" or "eager".

    Raises:
        ValueError: an option is out of range or unknown.
    """

    def __init__(
        self,
        temperature: float = 0.03,
        *,
        learnable: bool = False,
        temperature_range: tuple[float, float] = (0.01, 0.5),
        directions: Literal["both", "recovered_to_complete"] = "both",
        reduction: Literal["mean", "sum", "none"] = "mean",
        normalize: bool = True,
        eps: float = 1e-8,
        group: dist.ProcessGroup | None = None,
        gather: Literal["exact", "published"] | None = "exact",
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
        options: tuple[tuple[str, str | None, tuple[str | None, ...]], ...] = (
            ("directions", directions, DIRECTIONS),
            ("reduction", reduction, REDUCTIONS),
            ("gather", gather, GATHERS),
            ("backend", backend, BACKENDS),
        )
        for name, option, known in options:
            if option not in known:
                raise ValueError(f"{name}: got {option!r}, expected one of {', '.join(map(str, known))}")
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: got {type(normalize).__name__}, expected a bool")
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(float(temperature))) if learnable else float(temperature)
        self.temperature_range = (low, high)
        self.directions, self.reduction, self.normalize, self.eps = directions, reduction, normalize, eps
        self.group, self.gather, self.backend = group, gather, backend

    def forward(
        self, recovered: Tensor, complete: Tensor, valid: Tensor | None = None, same: Tensor | None = None
    ) -> Tensor:
        """Contrast row i of ``recovered`` with row i of ``complete`` against all others.

        Args:
            recovered: (N, D), or (G, N, D) for G separate contrasts.
            complete: (M, D) or (G, M, D), M >= N; rows from N on, such as hard negatives, are further negatives.
            valid: (N,) or (G, N) bool; invalid rows are left out.
            same: (M,) int64: rows of one id, such as captions of the same image, are no negatives of one another; the
                first N are ids of ``recovered`` too.

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
            same=same,
            normalize=self.normalize,
            eps=self.eps,
            group=self.group,
            gather=self.gather,
            backend=self.backend,
        )

    def clamped_temperature(self) -> float | Tensor:
        """The divisor of the similarities: a float, or a scalar tensor when it is learnable."""
        if not isinstance(self.temperature, Tensor):
            return self.temperature
        return self.temperature + (self.temperature.clamp(*self.temperature_range) - self.temperature).detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompletionLoss:
        # torch cannot copy a process group, so the copy shares it.
        memo[id(self.group)] = self.group
        copied = memo[id(self)] = self.__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        if isinstance(self.temperature, Tensor):
            temperature = f"learnable, temperature_range={self.temperature_range}"
        else:
            temperature = f"temperature={self.temperature}"
        options = f"directions={self.directions!r}, reduction={self.reduction!r}, gather={self.gather!r}"
        return f"{temperature}, {options}" + ("" if self.normalize else ", normalize=False")
