"""Cross-attention with few keys, which have absorbed the query and output projections: x (B, Lq, W) in, (B, Lq, W) out.

Scores are x . score_weight + score_bias, with one row of W a head and key; the result is probabilities . value_weight
(``absorb_into_keys`` of the reference). A program reads its rows of x once for all heads: a score tile has heads times
keys as columns, a head's keys padded to a power of two. The backward computes the probabilities again and leaves them,
and the gradients of the scores, to two matrix products over the queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.random import STREAM_ATTENTION
from sclkern.reference import attention_dropout_threshold

DROPOUT_STREAM = tl.constexpr(STREAM_ATTENTION)
LOG2_E = tl.constexpr(1.4426950408889634)

MIN_KEYS, MAX_KEYS = 16, 32
# Columns of a score tile; a program holds up to 6 tiles, 12 heads of 32 keys or 24 of 16. Tiles the backward sums at
# once, beside gradients that the forward does not have.
COLUMNS, MAX_HELD = 64, 3
# By bytes of an element: rows of a program, and channels a step. Two bytes: 64 rows are the fewest that the Hopper
# tensor cores take. Four: IEEE products run on the ordinary cores and hold their operands in registers. 8 warps,
# because 4 would spill. Not yet tuned on a GPU.
TILES, NUM_WARPS = {2: (64, 32), 4: (16, 16)}, 8


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
    place,  # (ROWS,) int64: rows of left
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
        tiles = tiles + (tl.zeros((ROWS, COLUMNS), tl.float32),)  # noqa: RUF005
    for start in range(0, WIDTH, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        left_mask = inside[:, None] & (channel < WIDTH)[None, :]
        left = tl.load(left_ptr + place[:, None] * WIDTH + channel[None, :], mask=left_mask, other=0.0)
        summed = ()
        for group in tl.static_range(FIRST, LAST):
            row, exists, _ = columns_of(group, batch, batches, heads, keys, None, COLUMNS, BLOCK_KEYS)
            right_mask = exists[:, None] & (channel < WIDTH)[None, :]
            right = tl.load(right_ptr + row[:, None] * WIDTH + channel[None, :], mask=right_mask, other=0.0)
            summed = summed + (tl.dot(left, tl.trans(right), tiles[group - FIRST], input_precision="ieee"),)  # noqa: RUF005
        tiles = summed
    return tiles


@triton.jit
def columns_times_rows(
    tiles,  # GROUPS of (ROWS, COLUMNS)
    right_ptr,  # (H, B, Lk, W)
    bias_ptr,  # (W,) or None
    out_ptr,  # (B, Lq, W)
    place,
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
            out_ptr + place[:, None] * WIDTH + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask
        )  # fmt: skip


@triton.jit
def softmax_by_head(scores, valid, BLOCK_KEYS: tl.constexpr):
    """Softmax of each head's columns: (ROWS, heads of the tile, BLOCK_KEYS); zeros for a head without a valid key."""
    scores = tl.where(valid[None, :], scores * LOG2_E, -float("inf"))
    scores = tl.reshape(scores, (scores.shape[0], scores.shape[1] // BLOCK_KEYS, BLOCK_KEYS))
    highest = tl.max(scores, 2, keep_dims=True)
    # Without a valid key this would be -inf - -inf.
    weights = tl.exp2(scores - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(weights, 2, keep_dims=True)
    return weights / tl.where(total == 0.0, 1.0, total)


@triton.jit
def sum_by_head(values, BLOCK_KEYS: tl.constexpr):
    """(ROWS, COLUMNS): in each column the sum over the columns of its head."""
    by_head = tl.reshape(values, (values.shape[0], values.shape[1] // BLOCK_KEYS, BLOCK_KEYS))
    return tl.reshape(tl.broadcast_to(tl.sum(by_head, 2, keep_dims=True), by_head.shape), values.shape)


@triton.jit
def kept(seed, batch, heads, row, group, threshold, COLUMNS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """(ROWS, heads of the tile, BLOCK_KEYS) bool: the probabilities that dropout keeps; four words serve eight keys."""
    head = group * (COLUMNS // BLOCK_KEYS) + tl.arange(0, COLUMNS // BLOCK_KEYS)
    batch_head = (batch * heads + head).to(tl.int32)[None, :, None]
    counter = (row[:, None, None] << 16) | tl.arange(0, BLOCK_KEYS // 8)[None, None, :]
    zero = counter * 0 + batch_head * 0
    word0, word1, word2, word3 = tl.philox(
        seed, zero + counter, zero + batch_head, zero + DROPOUT_STREAM, zero, n_rounds=7
    )
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["batches", "heads", "queries", "keys", "threshold"])
def cross_attention_forward_kernel(
    x_ptr,  # (B, Lq, W)
    score_weight_ptr,  # (H, B, Lk, W)
    score_bias_ptr,  # (H, B, Lk)
    value_weight_ptr,  # (H, B, Lk, W)
    out_bias_ptr,  # (W,)
    mask_ptr,  # (B, Lk) bool, or None
    seed_ptr,  # (1,) int64, or None without dropout
    out_ptr,  # (B, Lq, W)
    batches,
    heads,
    queries,
    keys,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    blocks = tl.cdiv(queries, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    place, inside = batch * queries + row, row < queries
    # fmt: off
    scores = rows_times_columns(x_ptr, score_weight_ptr, place, inside, batch, batches, heads, keys,
                                0, GROUPS, WIDTH, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
    used = ()
    for group in tl.static_range(GROUPS):
        column, exists, valid = columns_of(group, batch, batches, heads, keys, mask_ptr, COLUMNS, BLOCK_KEYS)
        bias = tl.load(score_bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
        weights = softmax_by_head(scores[group] + bias[None, :], valid, BLOCK_KEYS)
        if seed_ptr is not None:
            keep = kept(tl.load(seed_ptr), batch, heads, row, group, threshold, COLUMNS, BLOCK_KEYS)
            weights = tl.where(keep, weights * keep_scale, 0.0)
        used = used + (tl.reshape(weights, (ROWS, COLUMNS)).to(value_weight_ptr.dtype.element_ty),)  # noqa: RUF005
    columns_times_rows(used, value_weight_ptr, out_bias_ptr, out_ptr, place, inside, batch, batches, heads, keys,
                       WIDTH, GROUPS, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
    # fmt: on


@triton.jit
def score_places(place, inside, group, heads, COLUMNS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Offsets of one tile (ROWS, COLUMNS) in a (B, Lq, H, BLOCK_KEYS), and which of them exist."""
    column = group * COLUMNS + tl.arange(0, COLUMNS)
    width = heads * BLOCK_KEYS
    return place[:, None] * width + column[None, :], inside[:, None] & (column < width)[None, :]


@triton.jit(do_not_specialize=["batches", "heads", "queries", "keys", "threshold"])
def cross_attention_backward_kernel(
    grad_out_ptr,  # (B, Lq, W)
    x_ptr,  # (B, Lq, W)
    score_weight_ptr,  # (H, B, Lk, W)
    score_bias_ptr,  # (H, B, Lk)
    value_weight_ptr,  # (H, B, Lk, W)
    mask_ptr,  # (B, Lk) bool, or None
    seed_ptr,  # (1,) int64, or None without dropout
    grad_x_ptr,  # (B, Lq, W)
    grad_scores_ptr,  # (B, Lq, H, BLOCK_KEYS)
    used_ptr,  # (B, Lq, H, BLOCK_KEYS): what dropout left of the probabilities
    batches,
    heads,
    queries,
    keys,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    blocks = tl.cdiv(queries, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    place, inside = batch * queries + row, row < queries
    # fmt: off
    for first in tl.static_range(0, GROUPS, HELD):
        scores = rows_times_columns(x_ptr, score_weight_ptr, place, inside, batch, batches, heads, keys,
                                    first, first + HELD, WIDTH, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
        for group in tl.static_range(first, first + HELD):
            column, exists, valid = columns_of(group, batch, batches, heads, keys, mask_ptr, COLUMNS, BLOCK_KEYS)
            bias = tl.load(score_bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
            weights = softmax_by_head(scores[group - first] + bias[None, :], valid, BLOCK_KEYS)
            if seed_ptr is not None:
                # The sign remembers what is dropped, so that nothing is drawn twice.
                keep = kept(tl.load(seed_ptr), batch, heads, row, group, threshold, COLUMNS, BLOCK_KEYS)
                weights = tl.where(keep, weights, -weights)
            # Parked where what is used will be, because the next product needs their registers.
            offset, mask = score_places(place, inside, group, heads, COLUMNS, BLOCK_KEYS)
            weights = tl.reshape(weights, (ROWS, COLUMNS)).to(used_ptr.dtype.element_ty)
            tl.store(used_ptr + offset, weights, mask=mask)
    # Other threads may read them than wrote them.
    tl.debug_barrier()
    grad_scores = ()
    for first in tl.static_range(0, GROUPS, HELD):
        grad_used = rows_times_columns(grad_out_ptr, value_weight_ptr, place, inside, batch, batches, heads, keys,
                                       first, first + HELD, WIDTH, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
        for group in tl.static_range(first, first + HELD):
            offset, mask = score_places(place, inside, group, heads, COLUMNS, BLOCK_KEYS)
            weights = tl.load(used_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            grad_weights = grad_used[group - first]
            if seed_ptr is not None:
                used = tl.maximum(weights, 0.0) * keep_scale
                tl.store(used_ptr + offset, used.to(used_ptr.dtype.element_ty), mask=mask)
                grad_weights = tl.where(weights > 0.0, grad_weights * keep_scale, 0.0)
                weights = tl.abs(weights)
            grad = weights * (grad_weights - sum_by_head(weights * grad_weights, BLOCK_KEYS))
            grad = grad.to(grad_scores_ptr.dtype.element_ty)
            tl.store(grad_scores_ptr + offset, grad, mask=mask)
            grad_scores = grad_scores + (grad,)  # noqa: RUF005
    columns_times_rows(grad_scores, score_weight_ptr, None, grad_x_ptr, place, inside, batch, batches, heads, keys,
                       WIDTH, GROUPS, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
    # fmt: on


def configuration(heads: int, keys: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of both kernels."""
    block_keys = MIN_KEYS if keys <= MIN_KEYS else MAX_KEYS
    rows, channels = TILES[dtype.itemsize]
    return {
        "WIDTH": width, "GROUPS": triton.cdiv(heads * block_keys, COLUMNS), "ROWS": rows, "COLUMNS": COLUMNS,
        "CHANNELS": channels, "BLOCK_KEYS": block_keys,
    }  # fmt: skip


def _arguments(
    x: Tensor, score_weight: Tensor, score_bias: Tensor, value_weight: Tensor, mask: Tensor | None,
    seed: Tensor | None, dropout_p: float,
) -> dict:  # fmt: skip
    heads, batches, keys, width = score_weight.shape
    threshold, keep_scale = attention_dropout_threshold(dropout_p)
    return {
        "x_ptr": x, "score_weight_ptr": score_weight, "score_bias_ptr": score_bias, "value_weight_ptr": value_weight,
        "mask_ptr": mask, "seed_ptr": seed, "batches": batches, "heads": heads, "queries": x.shape[1], "keys": keys,
        "threshold": threshold, "keep_scale": keep_scale, "num_warps": NUM_WARPS, "enable_fp_fusion": True,
        **configuration(heads, keys, width, x.dtype),
    }  # fmt: skip


def cross_attention_forward(
    x: Tensor, score_weight: Tensor, score_bias: Tensor, value_weight: Tensor, out_bias: Tensor, mask: Tensor | None,
    seed: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    """x (B, Lq, W) and the tensors of ``absorb_into_keys``, all contiguous: (B, Lq, W)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        arguments = _arguments(x, score_weight, score_bias, value_weight, mask, seed, dropout_p)
        grid = (len(x) * triton.cdiv(x.shape[1], arguments["ROWS"]),)
        cross_attention_forward_kernel[grid](out_bias_ptr=out_bias, out_ptr=out, **arguments)
    return out


def cross_attention_backward(
    grad_out: Tensor, x: Tensor, score_weight: Tensor, score_bias: Tensor, value_weight: Tensor, mask: Tensor | None,
    seed: Tensor | None, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (B, Lq, W) and of the scores, and what dropout left of the probabilities, both (B, Lq, H,
    BLOCK_KEYS): zero where no key is, so that the products over the queries read whole vectors."""
    arguments = _arguments(x, score_weight, score_bias, value_weight, mask, seed, dropout_p)
    padded = (*x.shape[:2], len(score_weight), arguments["BLOCK_KEYS"])
    shapes = x.shape, padded, padded
    grad_x, grad_scores, used = (torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes)
    if grad_x.numel():
        grid = (len(x) * triton.cdiv(x.shape[1], arguments["ROWS"]),)
        arguments |= {"grad_x_ptr": grad_x, "grad_scores_ptr": grad_scores, "used_ptr": used}
        held = min(arguments["GROUPS"], MAX_HELD)
        cross_attention_backward_kernel[grid](grad_out_ptr=grad_out, HELD=held, **arguments)
    return grad_x, grad_scores, used


def _entry(kernel, name: str, dtype: torch.dtype, keys: int) -> dict:
    constants = configuration(12, keys, 768, dtype)
    constants |= {"HELD": MAX_HELD} if kernel is cross_attention_backward_kernel else {}
    tensors = (
        "x", "score_weight", "score_bias", "value_weight", "out_bias", "out", "grad_out", "grad_x", "grad_scores",
        "used",
    )  # fmt: skip
    signature = {f"{tensor}_ptr": f"*{name}" for tensor in tensors}
    signature |= {"mask_ptr": "*i1", "seed_ptr": "*i64", "keep_scale": "fp32"}
    return {"kernel": kernel, "signature": signature, "constants": constants, "num_warps": NUM_WARPS}


# What the static checks compile: 12 heads of 64 channels, with mask and dropout, which need the most registers.
AHEAD_OF_TIME = [
    _entry(kernel, name, dtype, keys)
    for kernel in (cross_attention_forward_kernel, cross_attention_backward_kernel)
    for name, dtype, keys in (("bf16", torch.bfloat16, 13), ("bf16", torch.bfloat16, 30), ("fp32", torch.float32, 13))
]
