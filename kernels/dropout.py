"""Which probabilities attention's dropout keeps: the one place where kernels draw it."""

from __future__ import annotations

import triton
import triton.language as tl

from sclkern.random import STREAM_ATTENTION
from sclkern.reference.attention import MAX_DROPOUT_KEYS

DROPOUT_STREAM = tl.constexpr(STREAM_ATTENTION)
# One word of the counter holds query << 16 | key // 8, which is why there are limits.
QUERY_SHIFT = tl.constexpr((MAX_DROPOUT_KEYS // 8).bit_length() - 1)


@triton.jit
def sequence_head(ids_ptr, batch, head, heads):
    """What tells the masks of one launch apart: index * heads + head, int32; with ids in place of indices int64."""
    if ids_ptr is None:
        return (batch * heads + head).to(tl.int32)
    else:
        return tl.load(ids_ptr + batch) * heads + head


@triton.jit
def dropout_keep_mask(seed, batch_head, query, key_group, threshold):
    """Bool, with an axis of eight neighbouring keys for each key group: the last axis grows eightfold.

    ``batch_head`` (of ``sequence_head``), ``query`` and ``key_group`` broadcast against each other. One call of Philox
    makes four words, whose halves serve eight keys, so that tiles of any size draw the same mask.
    """
    counter = (query << QUERY_SHIFT) | key_group
    low = batch_head.to(tl.int32)
    zero = counter * 0 + low * 0
    high = zero
    if batch_head.dtype == tl.int64:
        high += (batch_head >> 32).to(tl.int32)
    word0, word1, word2, word3 = tl.philox(
        seed, zero + counter, zero + low, zero + DROPOUT_STREAM, high, n_rounds=7
    )  # fmt: skip
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= threshold
