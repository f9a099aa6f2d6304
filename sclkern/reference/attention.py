"""``attention``, padded and packed, and ``frame_attention``, with their probabilities, dropout mask and packing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.random import STREAM_ATTENTION, philox, seed_tensor

# The counter of the dropout mask has 16 bits for the query and 16 for a group of eight keys.
MAX_DROPOUT_QUERIES, MAX_DROPOUT_KEYS = 2**16, 2**19
# A bias of at most this excludes a key, as -inf does: the kernels count in base 2, in which float32 has no such number.
# The lowest numbers of float32 and bfloat16, with which masks are written, are below.
LOWEST_BIAS = -torch.finfo(torch.float32).max * math.log(2)


def biased_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Where a bias (B or 1, H or 1, Lq, Lk) excludes no key and ``mask``, if there is one, is True."""
    # Not bias > LOWEST_BIAS, which would hide NaN.
    reached = ~(bias <= LOWEST_BIAS)
    return reached if mask is None else mask & reached


def attention_probabilities(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Softmax of scaled scores.

    Args:
        query: (B, Lq, H, D).
        key: (B, Lk, H, D).
        mask: bool, broadcastable to (B, H, Lq, Lk); True = attend. A query with no valid key gets zeros.
        bias: (B or 1, H or 1, Lq, Lk), added to the scaled scores, in float32 at least; ``LOWEST_BIAS`` and less
            exclude a key as ``mask`` does.
        softmax_scale: default 1 / sqrt(D).

    Returns:
        (B, H, Lq, Lk) in the dtype of ``query``.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query * scale, key)
    if bias is not None:
        mask = biased_mask(bias, mask)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias
    if mask is None:
        return scores.softmax(-1)
    # A finite fill: a row without a valid key then has finite gradients, and is zeroed afterwards.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    p = scores.softmax(-1).masked_fill(~mask, 0.0)
    return p if bias is None else p.to(query.dtype)


def attention_log_sum_exp(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Natural log-sum-exp of the scores of ``attention_probabilities``, without a gradient.

    Args:
        query: (B, Lq, H, D).
        key: (B, Lk, H, D).
        mask: as in ``attention_probabilities``.
        bias: as in ``attention_probabilities``.
        softmax_scale: default 1 / sqrt(D).

    Returns:
        (B, H, Lq) float32, float64 for float64; -inf for a query with no valid key.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", query.to(dtype) * scale, key.to(dtype))
        if bias is not None:
            mask, scores = biased_mask(bias, mask), scores + bias
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).logsumexp(-1)


def attention_dropout_threshold(dropout_p: float) -> tuple[int, float]:
    """The 16-bit draw from which a probability is kept, and the factor of kept probabilities.

    ``dropout_p`` is rounded to a multiple of 1 / 65536, and the factor is that of the rounded value.
    """
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def check_dropout_lengths(num_queries: int, num_keys: int) -> None:
    """Raise for lengths that the counter of the dropout mask has no room for.

    Args:
        num_queries: of the longest sequence.
        num_keys: of the longest sequence.

    Raises:
        ValueError: more than ``MAX_DROPOUT_QUERIES`` or ``MAX_DROPOUT_KEYS``.
    """
    if num_queries > MAX_DROPOUT_QUERIES or num_keys > MAX_DROPOUT_KEYS:
        raise ValueError(
            f"dropout_p: got {num_queries} queries and {num_keys} keys, expected at most {MAX_DROPOUT_QUERIES} and "
            f"{MAX_DROPOUT_KEYS} with dropout"
        )


def attention_dropout_mask(
    batch: int | Tensor,
    heads: int,
    queries: int,
    keys: int,
    *,
    dropout_p: float,
    seed: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The dropout mask of attention; each element depends on (seed, id * H + h, query, key) alone, not on a length.

    ``dropout_keep_mask`` in ``kernels/dropout.py`` draws the same mask in the kernels. One call of Philox with 7 rounds
    serves eight neighbouring keys by the 16-bit halves of its four words, the low half first. id * H + h wraps at
    2**64, so that ids from 0 to 2**63 / H - 1 have masks of their own.

    Args:
        batch: B, for the ids 0 to B - 1, or the ids of the samples, (B,) int64 on ``device``.
        heads: H.
        queries: Lq, at most 65536; the counter has no room for more.
        keys: Lk, at most 524288.
        dropout_p: dropout probability.
        seed: int, or int64 tensor of one element on ``device``.
        device: where the mask is drawn.

    Returns:
        (B, H, Lq, Lk) bool, True = keep.
    """
    check_dropout_lengths(queries, keys)
    ids = batch if isinstance(batch, Tensor) else torch.arange(batch, device=device)
    head, row, group = (torch.arange(size, device=device) for size in (heads, queries, (keys + 7) // 8))
    batch_head = (ids[:, None] * heads + head).flatten()
    counter = (batch_head[:, None, None] << 32) | (row[:, None] << 16) | group
    last = (batch_head >> 32)[:, None, None] if isinstance(batch, Tensor) else None
    words = torch.stack(philox(seed, counter, STREAM_ATTENTION, rounds=7, last=last), -1)
    draws = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(2)[..., :keys]
    return (draws >= attention_dropout_threshold(dropout_p)[0]).view(ids.shape[0], heads, queries, keys)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
    dropout_ids: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention with key padding, a bias of the scores and dropout on the probabilities.

    Args:
        query: (B, Lq, H, D).
        key: (B, Lk, H, D).
        value: (B, Lk, H, D).
        key_padding_mask: (B, Lk) bool, True = attend. Keys and values at other positions are never read, NaN included.
        bias: (B or 1, H or 1, Lq, Lk), as in ``attention_probabilities``.
        dropout_p: dropout probability.
        softmax_scale: default 1 / sqrt(D).
        seed: of the mask of ``attention_dropout_mask``; None is torch's own dropout, or with ``dropout_ids`` a seed
            that is drawn.
        dropout_ids: (B,) int64, of the samples in that mask; None are their indices.

    Returns:
        (B, Lq, H, D).
    """
    mask = None
    if key_padding_mask is not None:
        mask = key_padding_mask[:, None, None, :]
        # A probability of zero is not enough: 0 * NaN is NaN, forward and backward.
        padding = ~key_padding_mask[:, :, None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    probabilities = attention_probabilities(query, key, mask=mask, bias=bias, softmax_scale=softmax_scale)
    return torch.einsum("bhqk,bkhd->bqhd", attention_dropout(probabilities, dropout_p, seed, dropout_ids), value)


def attention_dropout(p: Tensor, dropout_p: float, seed: int | Tensor | None, dropout_ids: Tensor | None) -> Tensor:
    """Dropout of probabilities (B, H, Lq, Lk) as ``attention`` has it."""
    if dropout_p == 0 or (seed is None and dropout_ids is None):
        return F.dropout(p, dropout_p)
    batch = p.shape[0] if dropout_ids is None else dropout_ids
    seed = seed_tensor(seed, p.device)[0]
    keep = attention_dropout_mask(batch, *p.shape[1:], dropout_p=dropout_p, seed=seed, device=p.device)
    return p.masked_fill(~keep, 0.0) * attention_dropout_threshold(dropout_p)[1]


def pad_sequences(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(T, ...) as (B, max_seqlen, ...), zeros after each sequence; and (B, max_seqlen) bool, True = a token."""
    position = cu_seqlens[:-1, None] + torch.arange(max_seqlen, device=x.device)
    valid = position < cu_seqlens[1:, None]
    # Padding takes the row of zeros at the end.
    rows = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return rows.index_select(0, position.masked_fill(~valid, x.shape[0]).flatten()).unflatten(0, valid.shape), valid


def pack_sequences(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """The inverse of ``pad_sequences``: (B, max_seqlen, ...) as (total, ...), zeros after the last sequence."""
    batch, length = x.shape[:2]
    token = torch.arange(total, device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token.to(cu_seqlens.dtype), right=True)
    position = sequence * length + token - cu_seqlens[sequence]
    rows = torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
    return rows.index_select(0, position.masked_fill(sequence == batch, batch * length))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
    dropout_ids: Tensor | None = None,
) -> Tensor:
    """``attention`` of concatenated variable-length sequences, computed in the padded form; reads nothing back.

    Args:
        query: (Tq, H, D).
        key: (Tk, H, D).
        value: (Tk, H, D).
        cu_seqlens_q: (B + 1,) int32, where each sequence of query starts, and where the last one ends. Tokens after
            that end are never read and get zeros, in the result and in the gradients.
        cu_seqlens_k: the same for key and value.
        max_seqlen_q: no sequence of query is longer.
        max_seqlen_k: no sequence of key and value is longer.
        dropout_p: dropout probability.
        softmax_scale: default 1 / sqrt(D).
        seed: as in ``attention``; the mask of a sequence is that of a sample.
        dropout_ids: (B,) int64, of the sequences, as in ``attention``.

    Returns:
        (Tq, H, D).
    """
    padded, _ = pad_sequences(query, cu_seqlens_q, max_seqlen_q)
    keys, valid = pad_sequences(key, cu_seqlens_k, max_seqlen_k)
    values, _ = pad_sequences(value, cu_seqlens_k, max_seqlen_k)
    out = attention(
        padded, keys, values, key_padding_mask=valid, dropout_p=dropout_p, softmax_scale=softmax_scale, seed=seed,
        dropout_ids=dropout_ids,
    )  # fmt: skip
    return pack_sequences(out, cu_seqlens_q, query.shape[0])


def frame_attention_mask(num_frames: int, tokens_per_frame: int, device: torch.device | str) -> Tensor:
    """The mask of ``frame_attention``: (F * (1 + P), F * (1 + P)) bool, True = attend."""
    frame = torch.arange(num_frames, device=device).repeat_interleave(tokens_per_frame)
    is_cls = torch.arange(num_frames * tokens_per_frame, device=device) % tokens_per_frame == 0
    return (frame[:, None] == frame[None, :]) | is_cls[:, None]


def frame_attention(
    query: Tensor, key: Tensor, value: Tensor, num_frames: int, *, softmax_scale: float | None = None
) -> Tensor:
    """Attention of the flexible vision encoder: a frame's CLS attends to every token of every frame, a patch only to
    the tokens of its own frame. With one frame it is plain attention (reference: clip_model_video.py:47-63).

    Args:
        query: (B, F * (1 + P), H, D), frame by frame, CLS first in each frame.
        key: of the shape of query.
        value: of the shape of query.
        num_frames: F.
        softmax_scale: default 1 / sqrt(D).

    Returns:
        (B, F * (1 + P), H, D).
    """
    if num_frames == 1:
        return attention(query, key, value, softmax_scale=softmax_scale)
    batch, length, heads, width = query.shape
    framed = [x.reshape(batch * num_frames, length // num_frames, heads, width) for x in (query, key, value)]
    patches = attention(framed[0][:, 1:], framed[1], framed[2], softmax_scale=softmax_scale)
    cls = attention(query[:, :: length // num_frames], key, value, softmax_scale=softmax_scale)
    out = torch.cat([cls.reshape(batch * num_frames, 1, heads, width), patches], dim=1)
    return out.reshape(batch, length, heads, width)
