"""The forms of ``cross_attention`` that absorb projections, with dropout."""

from __future__ import annotations

import math

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
    # (B, H, Lk, Lq): a softmax over few keys is fast where its rows are not the last dimension.
    scores = torch.baddbmm(
        score_bias.transpose(0, 1).flatten(1)[..., None], score_weight.transpose(0, 1).flatten(1, 2), x.transpose(1, 2)
    ).unflatten(1, (num_heads, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask.transpose(2, 3), torch.finfo(scores.dtype).min)
    p = scores.softmax(2) * factors.transpose(2, 3)
    if mask is not None:
        p = p.masked_fill(~mask.transpose(2, 3), 0.0)
    return torch.baddbmm(out_bias, p.flatten(1, 2).transpose(1, 2), value_weight.transpose(0, 1).flatten(1, 2))
