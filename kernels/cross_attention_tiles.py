"""Tiles of scores that the forward and the backward of absorbed cross-attention share; see ``cross_attention``."""

from __future__ import annotations

import triton
import triton.language as tl

from sclkern.kernels.dropout import dropout_keep_mask, sequence_head

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def columns_of(group, batch, batches, heads, keys, mask_ptr, COLUMNS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Of the columns of a score tile, (COLUMNS,) each: row in a (H, B, Lk, ...), whether that row exists, and whether
    its key is there to attend to."""
    column = group * COLUMNS + tl.arange(0, COLUMNS)
    head, key = column // BLOCK_KEYS, column % BLOCK_KEYS
    exists = (head < heads) & (key < keys)
    valid = exists
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + batch * keys + key, mask=exists, other=0) != 0)
    return (head.to(tl.int64) * batches + batch) * keys + key, exists, valid


@triton.jit
def rows_times_columns(
    left_ptr,  # (B, Lq, W)
    right_ptr,  # (H, B, Lk, W)
    token,  # (ROWS,) int64: rows of left
    inside,  # (ROWS,)
    batch,
    batches,
    heads,
    keys,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """left . right^T over the channels, for the groups from FIRST to before LAST: a tuple of tiles (ROWS, COLUMNS)
    float32. left is read once for all of them."""
    tiles = ()
    for _group in tl.static_range(FIRST, LAST):
        tiles = tiles + (tl.zeros((ROWS, COLUMNS), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for start in range(0, WIDTH, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        left_mask = inside[:, None] & (channel < WIDTH)[None, :]
        left = tl.load(left_ptr + token[:, None] * WIDTH + channel[None, :], mask=left_mask, other=0.0)
        summed = ()
        for group in tl.static_range(FIRST, LAST):
            row, exists, _ = columns_of(group, batch, batches, heads, keys, None, COLUMNS, BLOCK_KEYS)
            right_mask = exists[:, None] & (channel < WIDTH)[None, :]
            right = tl.load(right_ptr + row[:, None] * WIDTH + channel[None, :], mask=right_mask, other=0.0)
            summed = summed + (tl.dot(left, tl.trans(right), tiles[group - FIRST], input_precision="ieee"),)  # type: ignore[assignment]  # noqa: RUF005
        tiles = summed
    return tiles


@triton.jit
def columns_times_rows(
    tiles,  # GROUPS of (ROWS, COLUMNS)
    right_ptr,  # (H, B, Lk, W)
    bias_ptr,  # (W,) or None
    out_ptr,  # (B, Lq, W)
    token,
    inside,
    batch,
    batches,
    heads,
    keys,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """out = tiles . right + bias, written once."""
    for start in range(0, WIDTH, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        out = tl.zeros((ROWS, CHANNELS), tl.float32)
        for group in tl.static_range(GROUPS):
            row, exists, _ = columns_of(group, batch, batches, heads, keys, None, COLUMNS, BLOCK_KEYS)
            right_mask = exists[:, None] & (channel < WIDTH)[None, :]
            right = tl.load(right_ptr + row[:, None] * WIDTH + channel[None, :], mask=right_mask, other=0.0)
            out = tl.dot(tiles[group], right, out, input_precision="ieee")
        if bias_ptr is not None:
            out += tl.load(bias_ptr + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)[None, :]
        out_mask = inside[:, None] & (channel < WIDTH)[None, :]
        tl.store(
            out_ptr + token[:, None] * WIDTH + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask
        )  # fmt: skip


@triton.jit
def softmax_by_head(scores, valid, BLOCK_KEYS: tl.constexpr):
    """Softmax of each head's columns: (ROWS, heads of the tile, BLOCK_KEYS); zeros for a head without a valid key."""
    scores = tl.where(valid[None, :], scores * LOG2_E, -float("inf"))
    scores = tl.reshape(scores, (scores.shape[0], scores.shape[1] // BLOCK_KEYS, BLOCK_KEYS))
    m_i = tl.max(scores, 2, keep_dims=True)
    # Without a valid key this would be -inf - -inf.
    p = tl.exp2(scores - tl.where(m_i == -float("inf"), 0.0, m_i))
    l_i = tl.sum(p, 2, keep_dims=True)
    return p / tl.where(l_i == 0.0, 1.0, l_i)


@triton.jit
def sum_by_head(values, BLOCK_KEYS: tl.constexpr):
    """(ROWS, COLUMNS): in each column the sum over the columns of its head."""
    by_head = tl.reshape(values, (values.shape[0], values.shape[1] // BLOCK_KEYS, BLOCK_KEYS))
    return tl.reshape(tl.broadcast_to(tl.sum(by_head, 2, keep_dims=True), by_head.shape), values.shape)


@triton.jit
def tile_keep_mask(seed, ids_ptr, batch, heads, row, group, threshold, COLUMNS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """(ROWS, heads of the tile, BLOCK_KEYS) bool: the probabilities that dropout keeps."""
    head = group * (COLUMNS // BLOCK_KEYS) + tl.arange(0, COLUMNS // BLOCK_KEYS)
    batch_head = sequence_head(ids_ptr, batch, head, heads)[None, :, None]
    key_group = tl.arange(0, BLOCK_KEYS // 8)[None, None, :]
    return dropout_keep_mask(seed, batch_head, row[:, None, None], key_group, threshold)


@triton.jit
def score_offsets(
    token, inside, group, heads, COLUMNS: tl.constexpr, BLOCK_KEYS: tl.constexpr, STORED_KEYS: tl.constexpr
):
    """Offsets of one tile (ROWS, COLUMNS) in a (B, Lq, H, STORED_KEYS), and which of them exist."""
    column = group * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < heads * BLOCK_KEYS
    if STORED_KEYS != BLOCK_KEYS:
        column = column // BLOCK_KEYS * STORED_KEYS + column % BLOCK_KEYS
    return token[:, None] * (heads * STORED_KEYS) + column[None, :], inside[:, None] & exists[None, :]


@triton.jit
def store_scores(ptr, values, offset, mask, BLOCK_KEYS: tl.constexpr, STORED_KEYS: tl.constexpr):
    """Store a tile at its ``score_offsets``, with zeros for the keys from BLOCK_KEYS on."""
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=mask)
    if STORED_KEYS != BLOCK_KEYS:
        tl.static_assert(STORED_KEYS == 2 * BLOCK_KEYS)
        tl.store(ptr + offset + BLOCK_KEYS, tl.zeros(values.shape, ptr.dtype.element_ty), mask=mask)


@triton.jit
def all_keys(mask_ptr, batch, keys, BLOCK_KEYS: tl.constexpr, SPLIT: tl.constexpr):
    """Whether a program computes all BLOCK_KEYS keys of its sample: with SPLIT only where it attends to one of the last
    half of them. Read on the device, so that nothing waits."""
    found = tl.constexpr(True)
    if SPLIT:  # noqa: SIM102, None has no operator
        if mask_ptr is not None:
            key = BLOCK_KEYS // 2 + tl.arange(0, BLOCK_KEYS // 2)
            attended = tl.load(mask_ptr + batch * keys + key, mask=key < keys, other=0)
            found = tl.max((attended != 0).to(tl.int32), 0) > 0
    return found
