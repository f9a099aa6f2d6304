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
def dropout_words(seed, batch_head, query, key_group, threshold):
    """Four words of Philox for eight neighbouring keys; arguments as of ``dropout_keep_mask``."""
    counter = (query << QUERY_SHIFT) | key_group
    low = batch_head.to(tl.int32)
    zero = counter * 0 + low * 0
    high = zero
    if batch_head.dtype == tl.int64:
        high += (batch_head >> 32).to(tl.int32)
    return tl.philox(seed, zero + counter, zero + low, zero + DROPOUT_STREAM, high, n_rounds=7)


@triton.jit
def dropout_keep_mask(seed, batch_head, query, key_group, threshold):
    """Bool, with an axis of eight neighbouring keys for each key group: the last axis grows eightfold.

    ``batch_head`` (of ``sequence_head``), ``query`` and ``key_group`` broadcast against each other. One call of Philox
    makes four words, whose halves serve eight keys, so that tiles of any size draw the same mask.
    """
    word0, word1, word2, word3 = dropout_words(seed, batch_head, query, key_group, threshold)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= threshold


@triton.jit
def dropped_halves(bits, word, threshold):
    """``bits`` moved up by two, below them whether the upper and the lower half of a word drop their keys."""
    # The sign of a difference; a funnel shift appends it in one instruction.
    bits = (bits << 1) | (((word >> 16) - threshold) >> 31)
    return (bits << 1) | (((word & 0xFFFF) - threshold) >> 31)


@triton.jit
def dropout_keep_bits(seed, batch_head, query, key_group, threshold):
    """``dropout_keep_mask`` with the eight keys of a group as the bits of a byte, the first the lowest."""
    word0, word1, word2, word3 = dropout_words(seed, batch_head, query, key_group, threshold)
    threshold = tl.cast(threshold, tl.uint32)
    bits = dropped_halves(dropped_halves(word3 * 0, word3, threshold), word2, threshold)
    bits = dropped_halves(dropped_halves(bits, word1, threshold), word0, threshold)
    return (bits ^ 0xFF).to(tl.uint8)


@triton.jit
def load_keep_mask(bits_ptr, row, inside, first_key, words, BLOCK_KEYS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(rows, BLOCK_KEYS) bool, (BLOCK_KEYS, rows) where ``TRANSPOSED``, of bits in memory, ``words`` of 32 keys a row
    (``attention_dropout_kernel``)."""
    BITS: tl.constexpr = BLOCK_KEYS if BLOCK_KEYS < 32 else 32
    word = first_key // 32 + tl.arange(0, BLOCK_KEYS // BITS)
    shift = first_key % 32 + tl.arange(0, BITS)
    offset = row.to(tl.int64) * words
    if not TRANSPOSED:
        mask = inside[:, None] & (word < words)[None, :]
        packed = tl.load(bits_ptr + offset[:, None] + word[None, :], mask=mask, other=0)
        bits = (packed[:, :, None] >> shift[None, None, :]) & 1
        return tl.reshape(bits, (bits.shape[0], BLOCK_KEYS)) != 0
    else:
        mask = (word < words)[:, None] & inside[None, :]
        packed = tl.load(bits_ptr + offset[None, :] + word[:, None], mask=mask, other=0)
        bits = (packed[:, None, :] >> shift[None, :, None]) & 1
        return tl.reshape(bits, (BLOCK_KEYS, bits.shape[2])) != 0
