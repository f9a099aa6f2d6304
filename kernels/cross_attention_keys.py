"""``absorb_into_keys`` of the reference with its backward written out: one node of autograd in place of thirty.

Products write into the gradients of whole weights, so that nothing is concatenated. Nothing here needs Triton.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.reference.cross_attention import absorb_into_keys as reference_absorb


def absorb_into_keys(tensors: tuple[Tensor, ...], heads: int, scale: float, mask: Tensor | None) -> tuple[Tensor, ...]:
    """As ``reference.cross_attention.absorb_into_keys``, contiguous, without a second derivative.

    Args:
        tensors: context (B, Lk, W), in_weight (3 W, W), in_bias (3 W,) and out_weight (W, W), contiguous.
        heads: H.
        scale: of the scores.
        mask: (B, Lk) bool, True = attend, or None.

    Returns:
        score_weight (H, B, Lk, W), score_bias (H, B, Lk) and value_weight (H, B, Lk, W).
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        absorbed = reference_absorb(*tensors, num_heads=heads, scale=scale, mask=mask)
        return tuple(tensor.contiguous() for tensor in absorbed)
    found: tuple[Tensor, ...] = _Absorb.apply(*tensors, heads, scale, mask)
    return found


class _Absorb(torch.autograd.Function):
    # B batch, K keys, H heads, D channels of a head, W = H D.
    @staticmethod
    def forward(
        ctx: Any, context: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, heads: int, scale: float,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        batch, keys, width = context.shape
        padding = None if mask is None else ~mask.unsqueeze(2)
        context = context if padding is None else context.masked_fill(padding, 0.0)
        query_weight, context_weight = in_weight.split((width, 2 * width))
        query_bias, context_bias = in_bias.split((width, 2 * width))
        projected = F.linear(context, context_weight, context_bias).view(batch * keys, 2, heads, width // heads)
        # (H, B K, D) each.
        key, value = projected.permute(1, 2, 0, 3).unbind()
        key = key * scale
        query_weight = query_weight.view(heads, -1, width)
        score_weight = torch.bmm(key, query_weight).view(heads, batch, keys, width)
        score_bias = torch.bmm(key, query_bias.view(heads, -1, 1)).view(heads, batch, keys)
        value_weight = torch.bmm(value, _by_head(out_weight, heads).mT).view(heads, batch, keys, width)
        ctx.save_for_backward(context, in_weight, in_bias, out_weight, key, value, padding)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return score_weight, score_bias, value_weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: what a checkpoint recomputes is given once.
        context, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError('cross_attention: the kernel has no second derivative; backend="eager" has')
        kind, arguments = context.device.type, (grads, context, *saved, ctx.scale, ctx.needs_input_grad)
        # It would round the products of float32 gradients; the context takes as long as a launch.
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            return _gradients(*arguments)


def _by_head(out_weight: Tensor, heads: int) -> Tensor:
    """(W, W) of the output projection, the columns of each head: (H, W, D), a view."""
    return out_weight.view(len(out_weight), heads, -1).transpose(0, 1)


def _gradients(
    grads: tuple[Tensor | None, ...], context: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor,
    key: Tensor, value: Tensor, padding: Tensor | None, scale: float, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    heads, rows, head_dim = key.shape
    width = heads * head_dim
    shapes = (heads, rows, width), (heads, rows, 1), (heads, rows, width)
    score_weight, score_bias, value_weight = (
        key.new_zeros(shape) if grad is None else grad.reshape(shape) for grad, shape in zip(grads, shapes, strict=True)
    )
    query_weight, context_weight = in_weight.split((width, 2 * width))
    grad_in_weight, grad_in_bias = torch.empty_like(in_weight), torch.empty_like(in_bias)
    of_query, of_context = grad_in_weight.split((width, 2 * width))
    of_query_bias, of_context_bias = grad_in_bias.split((width, 2 * width))
    grad_out_weight = torch.empty_like(out_weight)
    if needs[1]:
        torch.bmm(key.mT, score_weight, out=of_query.view(heads, head_dim, width))
    if needs[2]:
        torch.bmm(key.mT, score_bias, out=of_query_bias.view(heads, head_dim, 1))
    if needs[3]:
        torch.bmm(value_weight.mT, value, out=_by_head(grad_out_weight, heads))
    if not any(needs[:3]):
        return None, None, None, grad_out_weight, None, None, None
    projected = context.new_empty((rows, 2, heads, head_dim))
    grad_key, grad_value = projected.permute(1, 2, 0, 3).unbind()
    query_bias = in_bias[:width].view(heads, 1, head_dim)
    torch.bmm(score_bias, query_bias, out=grad_key)
    by_head = query_weight.view(heads, head_dim, width).mT
    torch.baddbmm(grad_key, score_weight, by_head, beta=scale, alpha=scale, out=grad_key)
    torch.bmm(value_weight, _by_head(out_weight, heads), out=grad_value)
    projected = projected.view(rows, 2 * width)
    if needs[1]:
        torch.mm(projected.T, context.view(rows, width), out=of_context)
    if needs[2]:
        torch.sum(projected, 0, out=of_context_bias)
    grad_context = None
    if needs[0]:
        grad_context = torch.mm(projected, context_weight).view(context.shape)
        if padding is not None:
            grad_context.masked_fill_(padding, 0.0)
    of_weights = (grad_in_weight, grad_in_bias, grad_out_weight)
    return (
        grad_context,
        *(g if needed else None for g, needed in zip(of_weights, needs[1:4], strict=True)),
        *[None] * 3,
    )
