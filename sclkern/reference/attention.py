"""``attention`` and ``frame_attention``: scores, their softmax, and what dropout leaves of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.random import STREAM_ATTENTION, philox


def attention_probabilities(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, softmax_scale: float | None = None
) -> Tensor:
    """Softmax of scaled scores.

    Args:
        query: (B, Lq, H, D). key: (B, Lk, H, D).
        mask: bool, broadcastable to (B, H, Lq, Lk); True = attend. A query with no valid key gets zeros.
        softmax_scale: default 1 / sqrt(D).

    Returns:
        (B, H, Lq, Lk) in the dtype of ``query``.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query * scale, key)
    if mask is None:
        return scores.softmax(-1)
    # A finite fill: a row without a valid key then has finite gradients, and is zeroed afterwards.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~mask, 0.0)


def attention_log_sum_exp(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, softmax_scale: float | None = None
) -> Tensor:
    """Natural log-sum-exp of the scores of ``attention_probabilities``, without a gradient.

    Returns:
        (B, H, Lq) float32, float64 for float64; -inf for a query with no valid key.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", query.to(dtype) * scale, key.to(dtype))
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).logsumexp(-1)


def attention_dropout_threshold(dropout_p: float) -> tuple[int, float]:
    """What a 16-bit draw must reach to keep its probability, and the factor of those kept.

    The probability of dropping is rounded to a multiple of 1 / 65536, and the factor is that of the rounded one.
    """
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def attention_dropout_mask(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    *,
    dropout_p: float,
    seed: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which probabilities dropout keeps; each depends on (seed, b * H + h, query, key) alone, not on a length.

    One call of Philox with 7 rounds serves eight neighbouring keys by the 16-bit halves of its four words, the low half
    first.

    Args:
        queries: at most 65536. keys: at most 524288; the counter has no room for more.

    Returns:
        (B, H, Lq, Lk) bool, True = keep.
    """
    if queries > 2**16 or keys > 2**19:
        raise ValueError(f"dropout: got {queries} queries and {keys} keys, expected at most 65536 and 524288")
    places = [torch.arange(size, device=device) for size in (batch * heads, queries, (keys + 7) // 8)]
    counter = (places[0][:, None, None] << 32) | (places[1][:, None] << 16) | places[2]
    words = torch.stack(philox(seed, counter, STREAM_ATTENTION, rounds=7), -1)
    draws = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(2)[..., :keys]
    return (draws >= attention_dropout_threshold(dropout_p)[0]).view(batch, heads, queries, keys)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention with key padding and dropout on the probabilities.

    Args:
        query: (B, Lq, H, D). key, value: (B, Lk, H, D).
        key_padding_mask: (B, Lk) bool, True = attend. What the other keys and values hold is never read, NaN too.
        dropout_p: probability of dropping a probability.
        seed: of the mask of ``attention_dropout_mask``; None is torch's own dropout.

    Returns:
        (B, Lq, H, D).
    """
    mask = None
    if key_padding_mask is not None:
        mask = key_padding_mask[:, None, None, :]
        # A probability of zero is not enough: 0 * NaN is NaN, forward and backward.
        padding = ~key_padding_mask[:, :, None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    probabilities = attention_probabilities(query, key, mask=mask, softmax_scale=softmax_scale)
    if seed is None or dropout_p == 0:
        probabilities = F.dropout(probabilities, dropout_p)
    else:
        keep = attention_dropout_mask(*probabilities.shape, dropout_p=dropout_p, seed=seed, device=query.device)
        probabilities = probabilities.masked_fill(~keep, 0.0) * attention_dropout_threshold(dropout_p)[1]
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, value)


def frame_attention_mask(num_frames: int, tokens_per_frame: int, device: torch.device | str) -> Tensor:
    """Who attends to whom in ``frame_attention``: (F * (1 + P), F * (1 + P)) bool, True = attend."""
    frame = torch.arange(num_frames, device=device).repeat_interleave(tokens_per_frame)
    is_cls = torch.arange(num_frames * tokens_per_frame, device=device) % tokens_per_frame == 0
    return (frame[:, None] == frame[None, :]) | is_cls[:, None]


def frame_attention(
    query: Tensor, key: Tensor, value: Tensor, num_frames: int, *, softmax_scale: float | None = None
) -> Tensor:
    """Attention of the flexible vision encoder: a frame's CLS attends to every token of every frame, a patch only to
    the tokens of its own frame. With one frame it is plain attention (reference: clip_model_video.py:47-63).

    Args:
        query, key, value: (B, F * (1 + P), H, D), frame by frame, CLS first in each frame.
        num_frames: F.

    Returns:
        (B, F * (1 + P), H, D).
    """
    if num_frames == 1:
        return attention(query, key, value, softmax_scale=softmax_scale)
    batch, length, heads, width = query.shape
    framed = [x.reshape(batch * num_frames, -1, heads, width) for x in (query, key, value)]
    patches = attention(framed[0][:, 1:], framed[1], framed[2], softmax_scale=softmax_scale)
    cls = attention(query[:, :: length // num_frames], key, value, softmax_scale=softmax_scale)
    out = torch.cat([cls.reshape(batch * num_frames, 1, heads, width), patches], dim=1)
    return out.reshape(batch, length, heads, width)
