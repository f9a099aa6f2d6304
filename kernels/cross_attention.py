"""Cross-attention with few keys, into which the query and output projections were folded: x (B, Lq, W) to (B, Lq, W).

Scores are x . score_weight + score_bias, with one row of W a head and key; the result is probabilities . value_weight
(``absorb_into_keys`` of the reference). A program reads its rows of x once for all heads: a score tile has heads times
keys as columns, with the keys of a head padded to a power of two. The backward computes the probabilities again and
stores them, and the gradients of the scores, for two matrix products over the queries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import LaunchConfig, resolve, select
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.cross_attention_tiles import (
    all_keys,
    columns_of,
    columns_times_rows,
    rows_times_columns,
    score_offsets,
    softmax_by_head,
    store_scores,
    sum_by_head,
    tile_keep_mask,
)
from sclkern.kernels.launch import launch, static_entry
from sclkern.reference import attention_dropout_threshold

# A program holds up to 6 tiles of 64 columns: 12 heads of 32 keys or 24 of 16.
MIN_KEYS, MAX_KEYS = 16, 32


@triton.jit
def forward_tile(
    x_ptr, score_weight_ptr, score_bias_ptr, value_weight_ptr, out_bias_ptr, mask_ptr, seed_ptr, ids_ptr, out_ptr,
    batch, batches, heads, queries, keys, threshold, keep_scale, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The rows of a program, which attend to the first BLOCK_KEYS keys at most."""
    row = tl.program_id(0) % tl.cdiv(queries, ROWS) * ROWS + tl.arange(0, ROWS)
    token, inside = batch * queries + row, row < queries
    # fmt: off
    scores = rows_times_columns(x_ptr, score_weight_ptr, token, inside, batch, batches, heads, keys,
                                0, GROUPS, WIDTH, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
    p_dropped = ()
    for group in tl.static_range(GROUPS):
        column, exists, valid = columns_of(group, batch, batches, heads, keys, mask_ptr, COLUMNS, BLOCK_KEYS)
        bias = tl.load(score_bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
        p = softmax_by_head(scores[group] + bias[None, :], valid, BLOCK_KEYS)
        if seed_ptr is not None:
            keep = tile_keep_mask(tl.load(seed_ptr), ids_ptr, batch, heads, row, group, threshold,
                                  COLUMNS, BLOCK_KEYS)
            p = tl.where(keep, p * keep_scale, 0.0)
        p_dropped = p_dropped + (tl.reshape(p, (ROWS, COLUMNS)).to(value_weight_ptr.dtype.element_ty),)  # type: ignore[assignment]  # noqa: RUF005
    columns_times_rows(p_dropped, value_weight_ptr, out_bias_ptr, out_ptr, token, inside, batch, batches, heads, keys,
                       WIDTH, GROUPS, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
    # fmt: on


@triton.jit(do_not_specialize=["batches", "heads", "queries", "keys", "threshold"])
def cross_attention_forward_kernel(
    x_ptr,  # (B, Lq, W)
    score_weight_ptr,  # (H, B, Lk, W)
    score_bias_ptr,  # (H, B, Lk)
    value_weight_ptr,  # (H, B, Lk, W)
    out_bias_ptr,  # (W,)
    mask_ptr,  # (B, Lk) bool, or None
    seed_ptr,  # (1,) int64, or None without dropout
    ids_ptr,  # (B,) int64, which key the dropout mask in place of the index, or None
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
    SPLIT: tl.constexpr,  # samples that attend to none of the last half of BLOCK_KEYS compute the first half alone
):
    batch = (tl.program_id(0) // tl.cdiv(queries, ROWS)).to(tl.int64)
    # fmt: off
    if all_keys(mask_ptr, batch, keys, BLOCK_KEYS, SPLIT):
        forward_tile(x_ptr, score_weight_ptr, score_bias_ptr, value_weight_ptr, out_bias_ptr, mask_ptr, seed_ptr,
                     ids_ptr, out_ptr, batch, batches, heads, queries, keys, threshold, keep_scale, WIDTH, GROUPS,
                     ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
    else:
        forward_tile(x_ptr, score_weight_ptr, score_bias_ptr, value_weight_ptr, out_bias_ptr, mask_ptr, seed_ptr,
                     ids_ptr, out_ptr, batch, batches, heads, queries, keys, threshold, keep_scale, WIDTH,
                     (GROUPS + 1) // 2, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS // 2)
    # fmt: on


@triton.jit
def backward_tile(
    grad_out_ptr, x_ptr, score_weight_ptr, score_bias_ptr, value_weight_ptr, mask_ptr, seed_ptr, ids_ptr, grad_x_ptr,
    grad_scores_ptr, p_dropped_ptr, batch, batches, heads, queries, keys, threshold, keep_scale, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, STORED_KEYS: tl.constexpr,
):  # fmt: skip
    """As ``forward_tile``; the keys of a head are STORED_KEYS in memory, of which the last are zeros."""
    row = tl.program_id(0) % tl.cdiv(queries, ROWS) * ROWS + tl.arange(0, ROWS)
    token, inside = batch * queries + row, row < queries
    # fmt: off
    for first in tl.static_range(0, GROUPS, HELD):
        scores = rows_times_columns(x_ptr, score_weight_ptr, token, inside, batch, batches, heads, keys,
                                    first, first + HELD, WIDTH, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
        for group in tl.static_range(first, first + HELD):
            column, exists, valid = columns_of(group, batch, batches, heads, keys, mask_ptr, COLUMNS, BLOCK_KEYS)
            bias = tl.load(score_bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
            p = softmax_by_head(scores[group - first] + bias[None, :], valid, BLOCK_KEYS)
            if seed_ptr is not None:
                # The sign remembers what is dropped, so that nothing is drawn twice.
                keep = tile_keep_mask(tl.load(seed_ptr), ids_ptr, batch, heads, row, group, threshold,
                                      COLUMNS, BLOCK_KEYS)
                p = tl.where(keep, p, -p)
            # Parked where the dropped probabilities will be, because the next product needs their registers.
            offset, mask = score_offsets(token, inside, group, heads, COLUMNS, BLOCK_KEYS, STORED_KEYS)
            p = tl.reshape(p, (ROWS, COLUMNS)).to(p_dropped_ptr.dtype.element_ty)
            store_scores(p_dropped_ptr, p, offset, mask, BLOCK_KEYS, STORED_KEYS)
    # Other threads may read them than wrote them.
    tl.debug_barrier()
    grad_scores = ()
    for first in tl.static_range(0, GROUPS, HELD):
        grad_p_dropped = rows_times_columns(grad_out_ptr, value_weight_ptr, token, inside, batch, batches, heads, keys,
                                       first, first + HELD, WIDTH, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
        for group in tl.static_range(first, first + HELD):
            offset, mask = score_offsets(token, inside, group, heads, COLUMNS, BLOCK_KEYS, STORED_KEYS)
            p = tl.load(p_dropped_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            grad_p = grad_p_dropped[group - first]
            if seed_ptr is not None:
                p_dropped = tl.maximum(p, 0.0) * keep_scale
                tl.store(p_dropped_ptr + offset, p_dropped.to(p_dropped_ptr.dtype.element_ty), mask=mask)
                grad_p = tl.where(p > 0.0, grad_p * keep_scale, 0.0)
                p = tl.abs(p)
            grad = p * (grad_p - sum_by_head(p * grad_p, BLOCK_KEYS))
            grad = grad.to(grad_scores_ptr.dtype.element_ty)
            store_scores(grad_scores_ptr, grad, offset, mask, BLOCK_KEYS, STORED_KEYS)
            grad_scores = grad_scores + (grad,)  # type: ignore[assignment]  # noqa: RUF005
    columns_times_rows(grad_scores, score_weight_ptr, None, grad_x_ptr, token, inside, batch, batches, heads, keys,
                       WIDTH, GROUPS, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS)
    # fmt: on


@triton.jit(do_not_specialize=["batches", "heads", "queries", "keys", "threshold"])
def cross_attention_backward_kernel(
    grad_out_ptr,  # (B, Lq, W)
    x_ptr,  # (B, Lq, W)
    score_weight_ptr,  # (H, B, Lk, W)
    score_bias_ptr,  # (H, B, Lk)
    value_weight_ptr,  # (H, B, Lk, W)
    mask_ptr,  # (B, Lk) bool, or None
    seed_ptr,  # (1,) int64, or None without dropout
    ids_ptr,  # (B,) int64, which key the dropout mask in place of the index, or None
    grad_x_ptr,  # (B, Lq, W)
    grad_scores_ptr,  # (B, Lq, H, BLOCK_KEYS)
    p_dropped_ptr,  # (B, Lq, H, BLOCK_KEYS): what dropout left of the probabilities
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
    SPLIT: tl.constexpr,  # as of the forward
):
    batch = (tl.program_id(0) // tl.cdiv(queries, ROWS)).to(tl.int64)
    # fmt: off
    if all_keys(mask_ptr, batch, keys, BLOCK_KEYS, SPLIT):
        backward_tile(grad_out_ptr, x_ptr, score_weight_ptr, score_bias_ptr, value_weight_ptr, mask_ptr, seed_ptr,
                      ids_ptr, grad_x_ptr, grad_scores_ptr, p_dropped_ptr, batch, batches, heads, queries, keys,
                      threshold, keep_scale, WIDTH, GROUPS, HELD, ROWS, COLUMNS, CHANNELS, BLOCK_KEYS, BLOCK_KEYS)
    else:
        backward_tile(grad_out_ptr, x_ptr, score_weight_ptr, score_bias_ptr, value_weight_ptr, mask_ptr, seed_ptr,
                      ids_ptr, grad_x_ptr, grad_scores_ptr, p_dropped_ptr, batch, batches, heads, queries, keys,
                      threshold, keep_scale, WIDTH, (GROUPS + 1) // 2, HELD, ROWS, COLUMNS, CHANNELS,
                      BLOCK_KEYS // 2, BLOCK_KEYS)
    # fmt: on


def padded_keys(keys: int) -> int:
    """Columns that a head has in a score tile."""
    return MIN_KEYS if keys <= MIN_KEYS else MAX_KEYS


def _constants(config: LaunchConfig, heads: int, keys: int, width: int) -> dict[str, int]:
    block_keys = padded_keys(keys)
    return {"WIDTH": width, "GROUPS": ceil_div(heads * block_keys, config["COLUMNS"]), "BLOCK_KEYS": block_keys}


def _launch(
    kernel: Any,
    config: LaunchConfig | None,
    x: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_ids: Tensor | None,
    dropout_p: float,
    /,
    **tensors: Tensor,
) -> None:
    heads, batches, keys, width = score_weight.shape
    (chosen,) = resolve(config, (kernel.fn.__name__,), x, heads=heads, keys=keys)
    threshold, keep_scale = attention_dropout_threshold(dropout_p)
    launch(
        kernel,
        (len(x) * ceil_div(x.shape[1], chosen["ROWS"]),),
        chosen,
        x_ptr=x,
        score_weight_ptr=score_weight,
        score_bias_ptr=score_bias,
        value_weight_ptr=value_weight,
        mask_ptr=mask,
        seed_ptr=seed,
        ids_ptr=dropout_ids,
        batches=batches,
        heads=heads,
        queries=x.shape[1],
        keys=keys,
        threshold=threshold,
        keep_scale=keep_scale,
        **{f"{name}_ptr": tensor for name, tensor in tensors.items()},
        **_constants(chosen, heads, keys, width),
    )


def cross_attention_forward(
    x: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    out_bias: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dropout_ids: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """x (B, Lq, W) and the tensors of ``absorb_into_keys``, all contiguous: (B, Lq, W)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        common = x, score_weight, score_bias, value_weight, mask, seed, dropout_ids, dropout_p
        _launch(cross_attention_forward_kernel, config, *common, out_bias=out_bias, out=out)
    return out


def cross_attention_backward(
    grad_out: Tensor,
    x: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dropout_ids: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, Lq, W) and of the scores, and the probabilities after dropout, both (B, Lq, H, BLOCK_KEYS).

    The latter two are zero where no key is, so that the products over the queries read whole vectors.
    """
    padded = (*x.shape[:2], len(score_weight), padded_keys(score_weight.shape[2]))
    shapes = x.shape, padded, padded
    grad_x, grad_scores, p_dropped = (torch.empty(shape, dtype=x.dtype, device=x.device) for shape in shapes)
    if grad_x.numel():
        written = {"grad_x": grad_x, "grad_scores": grad_scores, "p_dropped": p_dropped}
        common = x, score_weight, score_bias, value_weight, mask, seed, dropout_ids, dropout_p
        _launch(cross_attention_backward_kernel, config, *common, grad_out=grad_out, **written)
    return grad_x, grad_scores, p_dropped


def _entry(kernel: Any, config: LaunchConfig, name: str, keys: int) -> dict[str, Any]:
    tensors = (
        "x", "score_weight", "score_bias", "value_weight", "out_bias", "out", "grad_out", "grad_x", "grad_scores",
        "p_dropped",
    )  # fmt: skip
    signature = {f"{tensor}_ptr": f"*{name}" for tensor in tensors}
    signature |= {"mask_ptr": "*i1", "seed_ptr": "*i64", "ids_ptr": "*i64", "keep_scale": "fp32"}
    return static_entry(kernel, config, signature, **_constants(config, 12, keys, 768))


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile: 12 heads of head_dim 64, with mask and dropout, which need the most registers."""
    entries = []
    for pass_, kernel in (("forward", cross_attention_forward_kernel), ("backward", cross_attention_backward_kernel)):
        for name, dtype, keys in (
            ("bf16", torch.bfloat16, 13),
            ("bf16", torch.bfloat16, 30),
            ("fp32", torch.float32, 13),
        ):
            (config,) = select("cross_attention", pass_, dtype, arch, heads=12, keys=keys)
            entries.append(_entry(kernel, config, name, keys))
    return entries
