"""Dropout of a branch, its sum with the residual stream, and the norm of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sclkern.cpu.dropout import feature_pieces
from sclkern.random import seed_tensor
from sclkern.reference.dropout_add_layer_norm import feature_dropout_scale, norm_of_sum

# Rows at once in the backward.
ROWS = 128


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, ids: Tensor, seed: int, dropout_p: float) -> Tensor:
        total = residual.new_empty(residual.shape)
        keep = torch.empty(x.shape, dtype=torch.bool)
        ctx.scale, ctx.dtype = feature_dropout_scale(dropout_p), x.dtype
        factors = total.new_empty(0)
        for rows, draws, threshold in feature_pieces(ids, x.shape[1], dropout_p, seed):
            if len(factors) != len(draws):
                factors = total.new_empty(draws.shape)
            torch.ge(draws, threshold, out=keep[rows])
            torch.ge(draws, threshold, out=factors)
            torch.addcmul(residual[rows], x[rows].to(total.dtype), factors, value=ctx.scale, out=total[rows])
        ctx.save_for_backward(keep)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, grad, None, None, None
        grad_x = torch.empty(grad.shape, dtype=ctx.dtype)
        room = grad.new_empty((min(ROWS, len(grad)), grad.shape[1]))
        for start in range(0, len(grad), ROWS):
            rows = slice(start, start + ROWS)
            factors = room[: len(keep[rows])].copy_(keep[rows])
            factors *= ctx.scale
            torch.mul(grad[rows], factors, out=grad_x[rows])
        return grad_x, grad, None, None, None


def dropout_add(
    x: Tensor, residual: Tensor, *, dropout_p: float, seed: int | Tensor | None, dropout_ids: Tensor | None
) -> Tensor:
    """``residual + dropout(x)`` with the mask of ``reference.feature_dropout_keep``.

    Args:
        x: (..., D).
        residual: like x.
        dropout_p: above 0, and less than 1 when rounded to a multiple of 1 / 65536.
        seed: of the mask; None draws one.
        dropout_ids: (...) int64, of the rows; None are their indices.

    Returns:
        (..., D) in the wider dtype of both.
    """
    number = int(seed_tensor(seed, x.device))
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    ids = torch.arange(rows) if dropout_ids is None else dropout_ids.flatten()
    wide = residual.to(torch.promote_types(x.dtype, residual.dtype))
    out: Tensor = _DropoutAdd.apply(x.reshape(rows, columns), wide.reshape(rows, columns), ids, number, dropout_p)
    return out.view(x.shape)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, x_bias: Tensor | None, dropout_p: float, eps: float,
    seed: int | Tensor | None, dropout_ids: Tensor | None, return_sum: bool, return_copy: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``reference.dropout_add_layer_norm`` with dropout; None as the seed draws one."""
    added = x if x_bias is None else x + x_bias.to(x.dtype)
    total = dropout_add(added, residual, dropout_p=dropout_p, seed=seed, dropout_ids=dropout_ids)
    return norm_of_sum(total, x.dtype, weight, bias, eps=eps, return_sum=return_sum, return_copy=return_copy)
