"""The forms of ``cross_attention`` that absorb projections, with dropout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sclkern.cpu.dropout import LOWEST, PIECE, attention_counters, attention_draws
from sclkern.random import seed_tensor
from sclkern.reference.attention import attention_dropout_threshold
from sclkern.reference.cross_attention import (
    absorb_into_keys,
    absorbed_into_queries,
    masked_softmax,
)


def dropout_factors(
    shape: tuple[int, ...], dtype: torch.dtype, dropout_p: float, seed: int | Tensor | None, dropout_ids: Tensor | None
) -> Tensor:
    """What dropout multiplies probabilities (B, H, Lq, Lk) with; None as the seed draws one."""
    batch, heads, queries, keys = shape
    ids = torch.arange(batch) if dropout_ids is None else dropout_ids
    by_head = (ids[:, None] * heads + torch.arange(heads)).flatten()
    threshold, factor = attention_dropout_threshold(dropout_p)
    counters, number = attention_counters(queries, keys), int(seed_tensor(seed, "cpu"))
    factors = torch.empty((batch * heads, queries, keys), dtype=dtype)
    for first in range(0, len(by_head), rows := max(1, PIECE // max(1, len(counters)))):
        part = slice(first, first + rows)
        torch.ge(attention_draws(by_head[part], counters, queries, keys, number), threshold + LOWEST, out=factors[part])
    return factors.mul_(factor).view(shape)


class _AbsorbedIntoKeys(torch.autograd.Function):
    """``reference.absorbed_attention`` with its scores by key, (B, H, Lk, Lq): torch's softmax over few keys is fast
    where these are not the last dimension, and every product and gradient lies as the next one reads it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, score_weight: Tensor, value_weight: Tensor, score_bias: Tensor, factors: Tensor,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        bias = score_bias.flatten(1)[..., None]
        scores = torch.baddbmm(bias, score_weight, x.transpose(1, 2)).view(factors.shape)
        if mask is not None:
            padding = ~mask[:, None, :, None]
            scores.masked_fill_(padding, torch.finfo(scores.dtype).min)
        p = scores.softmax(2)
        if mask is not None:
            p.masked_fill_(padding, 0.0)
        ctx.save_for_backward(x, score_weight, value_weight, p, factors)
        return torch.bmm((p * factors).flatten(1, 2).transpose(1, 2), value_weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, score_weight, value_weight, p, factors = ctx.saved_tensors
        grad_value_weight = torch.bmm((p * factors).flatten(1, 2), grad)
        grad_p = torch.bmm(value_weight, grad.transpose(1, 2)).view(p.shape)
        grad_p *= factors
        grad_p *= p
        grad_scores = torch.addcmul(grad_p, p, grad_p.sum(2, keepdim=True), value=-1)
        rows = grad_scores.flatten(1, 2)
        grad_x = torch.bmm(rows.transpose(1, 2), score_weight)
        return grad_x, torch.bmm(rows, x), grad_value_weight, grad_scores.sum(3), None, None


def cross_attention(
    x: Tensor, context: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, *,
    num_heads: int, key_padding_mask: Tensor | None, dropout_p: float, softmax_scale: float | None,
    seed: int | Tensor | None, dropout_ids: Tensor | None, absorb: str,
) -> Tensor:  # fmt: skip
    """``reference.cross_attention`` of a form that absorbs, with dropout; None as the seed draws one."""
    batch, num_queries, width = x.shape
    scale = 1 / math.sqrt(width // num_heads) if softmax_scale is None else softmax_scale
    shape = batch, num_heads, num_queries, context.shape[1]
    factors = dropout_factors(shape, x.dtype, dropout_p, seed, dropout_ids)
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None]
    if absorb == "queries":
        if key_padding_mask is not None:
            context = context.masked_fill(~key_padding_mask[:, :, None], 0.0)

        def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
            p_dropped = masked_softmax(scores, mask) * factors
            return p_dropped, p_dropped.sum(-1)

        tensors = x, context, in_weight, in_bias, out_weight, out_bias
        return absorbed_into_queries(*tensors, num_heads=num_heads, scale=scale, softmax=softmax)
    score_weight, score_bias, value_weight = absorb_into_keys(
        context, in_weight, in_bias, out_weight, num_heads=num_heads, scale=scale, mask=key_padding_mask
    )
    weights = (weight.transpose(0, 1).flatten(1, 2) for weight in (score_weight, value_weight))
    by_key = factors.transpose(2, 3).contiguous()
    out: Tensor = _AbsorbedIntoKeys.apply(x, *weights, score_bias.transpose(0, 1), by_key, key_padding_mask)
    return out + out_bias
