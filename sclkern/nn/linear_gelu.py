"""``LinearGELU``: a linear layer followed by a GELU."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import cpu, ops
from sclkern.cpu.gelu import quick_gelu
from sclkern.ops.bias_gelu import KINDS
from sclkern.ops.dispatch import select_backend, takes_cpu_form


class LinearGELU(nn.Linear):
    """``torch.nn.Linear`` followed by a GELU; on a GPU bias and GELU are one kernel that keeps no activation.

    The ``state_dict`` is that of ``torch.nn.Linear``.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        approximate: "none", "tanh" or "quick" (see ``sclkern.ops.bias_gelu``).
        backend: "auto", "triton" or "eager".
        **options: ``bias``, ``device`` and ``dtype``, as in torch.

    Raises:
        ValueError: unknown ``approximate``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        approximate: Literal["none", "tanh", "quick"] = "none",
        backend: str = "auto",
        **options: Any,
    ) -> None:
        if approximate not in KINDS:
            raise ValueError(f"approximate: got {approximate!r}, expected one of {', '.join(KINDS)}")
        super().__init__(in_features, out_features, **options)
        self.approximate, self.backend = approximate, backend

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear_gelu(x, self.weight, self.bias, self.approximate, self.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate!r}"


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    approximate: Literal["none", "tanh", "quick"],
    backend: str,
) -> Tensor:
    """GELU of ``x @ weight.T + bias``.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.
        approximate: "none", "tanh" or "quick".
        backend: "auto", "triton" or "eager".

    Returns:
        (..., O).
    """
    choice = select_backend(x, weight, backend=backend)
    if bias is not None and choice.backend == "triton":
        return ops.bias_gelu(F.linear(x, weight), bias, approximate=approximate, backend=backend)
    # Without a kernel the matrix product adds the bias at no cost.
    hidden = F.linear(x, weight, bias)
    if approximate == "quick" and takes_cpu_form(choice, backend, hidden) and not cpu.problems(hidden):
        return quick_gelu(hidden)
    if approximate == "quick":
        return hidden * torch.sigmoid(1.702 * hidden)
    return F.gelu(hidden, approximate=approximate)
