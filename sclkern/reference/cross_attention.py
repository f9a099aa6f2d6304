"""``cross_attention``: the whole sub-layer, and its forms that absorb projections into the shorter side."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.reference.attention import attention, attention_dropout

# A form is used if it needs at most this share of the definition's multiply-adds: its smaller products save less time
# than multiply-adds. On one core of a CPU a share of 0.27 takes 0.35 of the time, 0.5 takes 0.7, 0.8 takes 0.9.
MAX_COST_RATIO = 0.8


def cross_attention(
    x: Tensor,
    context: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    num_heads: int,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
    dropout_ids: Tensor | None = None,
    absorb: str = "never",
) -> Tensor:
    """Query, key and value projections, attention, output projection.

    With W_q, W_k, W_v the rows of ``in_weight`` and W_o the columns of ``out_weight`` that belong to head h::

        out = sum over h of dropout(softmax(scale (x W_q^T + b_q) (c W_k^T + b_k)^T)) (c W_v^T + b_v) W_o^T + b_o

    The products associate: a few keys can absorb W_q and W_o, a few queries W_k and W_v. Neither form rounds as the
    definition does, and both equal it in exact arithmetic.

    Args:
        x: (B, Lq, W).
        context: (B, Lk, W).
        in_weight: (3 W, W), the rows of query, key and value.
        in_bias: (3 W,), likewise.
        out_weight: (W, W).
        out_bias: (W,).
        num_heads: H, which divides W.
        key_padding_mask: (B, Lk) bool, True = attend. Other rows of the context are never read, NaN included; a sample
            without a valid key gets ``out_bias``.
        dropout_p: dropout probability.
        softmax_scale: default 1 / sqrt(W / H).
        seed: of the mask of ``attention_dropout_mask``; None is torch's own dropout, or with ``dropout_ids`` a seed
            that is drawn.
        dropout_ids: (B,) int64, of the samples in that mask; None are their indices.
        absorb: "never" is the definition, "keys" and "queries" the two forms.

    Returns:
        (B, Lq, W).
    """
    width = x.shape[-1]
    scale = 1 / math.sqrt(width // num_heads) if softmax_scale is None else softmax_scale
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "dropout_ids": dropout_ids}
    if absorb == "keys":
        absorbed = absorb_into_keys(
            context, in_weight, in_bias, out_weight, num_heads=num_heads, scale=scale, mask=key_padding_mask
        )
        return absorbed_attention(x, *absorbed, out_bias, key_padding_mask, **options)
    if key_padding_mask is not None:
        context = context.masked_fill(~key_padding_mask[:, :, None], 0.0)
    if absorb == "queries":

        def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
            mask = None if key_padding_mask is None else key_padding_mask[:, None, None]
            p_dropped = attention_dropout(masked_softmax(scores, mask), dropout_p, seed, dropout_ids)
            return p_dropped, p_dropped.sum(-1)

        tensors = x, context, in_weight, in_bias, out_weight, out_bias
        return absorbed_into_queries(*tensors, num_heads=num_heads, scale=scale, softmax=softmax)
    query = F.linear(x, in_weight[:width], in_bias[:width]).unflatten(-1, (num_heads, -1))
    key, value = F.linear(context, in_weight[width:], in_bias[width:]).chunk(2, -1)
    key, value = (tensor.unflatten(-1, (num_heads, -1)) for tensor in (key, value))
    out = attention(query, key, value, key_padding_mask=key_padding_mask, softmax_scale=scale, **options)
    return F.linear(out.flatten(-2), out_weight, out_bias)


def absorbed_into_queries(
    x: Tensor,
    context: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    num_heads: int,
    scale: float,
    softmax: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """The form "queries" of ``cross_attention``: the context is never projected.

    Args:
        x: (B, Lq, W).
        context: (B, Lk, W), zeros where nothing is to be attended to.
        in_weight: (3 W, W).
        in_bias: (3 W,).
        out_weight: (W, W).
        out_bias: (W,).
        num_heads: H.
        scale: of the scores.
        softmax: of scores (B, H, Lq, Lk) what dropout leaves of their masked softmax, and the sums of its rows.

    Returns:
        (B, Lq, W).
    """
    width = x.shape[-1]
    # One split of each, whose gradient is one tensor: every slice would fill another of the whole.
    query_weight, *context_weights = in_weight.split(width)
    query_bias, _, value_bias = in_bias.split(width)
    query = F.linear(x, query_weight, query_bias).unflatten(-1, (num_heads, -1))
    key_weight, value_weight = (weight.view(num_heads, -1, width) for weight in context_weights)
    queries = _by_head(query * scale, key_weight)
    # (B, H, Lq, Lk). A bias of the keys would shift every score of a query alike.
    scores = queries.transpose(1, 2).flatten(1, 2) @ context.transpose(1, 2)
    p_dropped, total = softmax(scores.view(len(x), num_heads, x.shape[1], context.shape[1]))
    mixed = (p_dropped.flatten(1, 2) @ context).view(queries.transpose(1, 2).shape).transpose(1, 2)
    # After dropout a row of probabilities does not sum to 1, which scales the bias of the values.
    bias = total.transpose(1, 2)[..., None] * value_bias.view(num_heads, -1)
    out = _by_head(mixed, value_weight.transpose(1, 2)) + bias
    return F.linear(out.flatten(-2), out_weight, out_bias)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """(B, L, H, D) and (H, D, E): the product of each head, (B, L, H, E)."""
    rows = x.flatten(0, 1).transpose(0, 1)
    return torch.bmm(rows, weight).transpose(0, 1).unflatten(0, x.shape[:2])


def absorb_into_keys(
    context: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    *,
    num_heads: int,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold the projections of queries and outputs into the keys and values.

    Then scores = x . score_weight + score_bias and out = probabilities . value_weight.

    Args:
        context: (B, Lk, W).
        in_weight: (3 W, W).
        in_bias: (3 W,).
        out_weight: (W, W).
        num_heads: H.
        scale: of the scores.
        mask: (B, Lk) bool, True = attend, or None.

    Returns:
        score_weight (H, B, Lk, W), score_bias (H, B, Lk) and value_weight (H, B, Lk, W).
    """
    batch, keys, width = context.shape
    if mask is not None:
        context = context.masked_fill(~mask[:, :, None], 0.0)
    # One split, whose gradient is one tensor: two slices would each fill another of the whole.
    query_weight, context_weight = in_weight.split((width, 2 * width))
    query_bias, context_bias = in_bias.split((width, 2 * width))
    key, value = F.linear(context, context_weight, context_bias).chunk(2, -1)
    key, value = (t.unflatten(-1, (num_heads, -1)).flatten(0, 1).transpose(0, 1) for t in (key * scale, value))
    # Of each head: (H, D, W), (H, D, 1) and (H, D, W).
    query_weight = query_weight.view(num_heads, -1, width)
    query_bias = query_bias.view(num_heads, -1, 1)
    head_out = out_weight.view(width, num_heads, -1).permute(1, 2, 0)
    products = (torch.bmm(key, query_weight), torch.bmm(key, query_bias).squeeze(-1), torch.bmm(value, head_out))
    score_weight, score_bias, value_weight = (t.unflatten(1, (batch, keys)) for t in products)
    return score_weight, score_bias, value_weight


def absorbed_attention(
    x: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    out_bias: Tensor,
    mask: Tensor | None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dropout_ids: Tensor | None = None,
) -> Tensor:
    """Attention with the tensors of ``absorb_into_keys``, without further projections.

    Args:
        x: (B, Lq, W).
        score_weight: (H, B, Lk, W).
        score_bias: (H, B, Lk).
        value_weight: (H, B, Lk, W).
        out_bias: (W,).
        mask: (B, Lk) bool, True = attend, or None.
        dropout_p: dropout probability.
        seed: as in ``cross_attention``.
        dropout_ids: as in ``cross_attention``.

    Returns:
        (B, Lq, W).
    """
    p = absorbed_probabilities(x, score_weight, score_bias, mask)
    p_dropped = attention_dropout(p.transpose(1, 2), dropout_p, seed, dropout_ids).transpose(1, 2)
    return p_dropped.flatten(2) @ value_weight.transpose(0, 1).flatten(1, 2) + out_bias


def absorbed_probabilities(x: Tensor, score_weight: Tensor, score_bias: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax of ``absorbed_attention``, before dropout: (B, Lq, H, Lk)."""
    scores = x @ score_weight.transpose(0, 1).flatten(1, 2).transpose(1, 2)
    heads, _, keys, _ = score_weight.shape
    scores = scores.unflatten(-1, (heads, keys)) + score_bias.transpose(0, 1)[:, None]
    return masked_softmax(scores, None if mask is None else mask[:, None, None])


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last dimension where ``mask`` is True, 0 elsewhere."""
    if mask is None:
        return scores.softmax(-1)
    # A finite fill: a row without a valid key then has finite gradients, and is zeroed afterwards.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0.0)


def relative_costs(num_queries: int, num_keys: int, width: int, num_heads: int, computed_keys: int) -> dict[str, float]:
    """Multiply-adds of the forms, as shares of those of the definition.

    The definition projects queries and outputs, keys and values, and its core multiplies D channels a score, twice.
    A form projects its short side four times, and its core multiplies all W channels a score and head, twice.

    Args:
        num_queries: Lq.
        num_keys: Lk.
        width: W.
        num_heads: H.
        computed_keys: keys that the form "keys" computes, with those a kernel pads with.

    Returns:
        The share of each form, by its name.
    """
    definition = max(1, 2 * (num_queries + num_keys) * width + 2 * num_queries * num_keys)
    scores = 2 * num_heads * num_queries
    return {
        "never": 1.0,
        "keys": (4 * num_keys * width + scores * computed_keys) / definition,
        "queries": (4 * num_queries * width + scores * num_keys) / definition,
    }


def cheapest_form(forms: Collection[str], costs: dict[str, float]) -> str:
    """The form of the least cost, or "never" where it is among them and nothing else is worth it.

    Args:
        forms: names of those that can be used.
        costs: of ``relative_costs``.

    Returns:
        The name.
    """
    # Not min(): torch.compile cannot trace its key.
    form, *others = forms
    for other in others:
        form = other if costs[other] < costs[form] else form
    return "never" if "never" in forms and costs[form] > MAX_COST_RATIO else form
