"""CLIP's GELU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLOPE = 1.702
# Elements at once.
PIECE = 2**17


class _QuickGELU(torch.autograd.Function):
    """``x * sigmoid(1.702 x)``, which is ``silu(1.702 x) / 1.702``; the input alone is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        for piece, result in zip(x.view(-1).split(PIECE), out.view(-1).split(PIECE), strict=True):
            torch.ops.aten.silu.out(piece * SLOPE, out=result)
            result *= 1 / SLOPE
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        parts = (tensor.view(-1).split(PIECE) for tensor in (grad.contiguous(), x, grad_x))
        for by, piece, result in zip(*parts, strict=True):
            torch.ops.aten.silu_backward.grad_input(by, piece * SLOPE, grad_input=result)
        return grad_x


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)`` of contiguous x (...)."""
    out: Tensor = _QuickGELU.apply(x)
    return out
