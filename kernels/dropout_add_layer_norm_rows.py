"""Rows in registers: dropout, sum, LayerNorm and its gradient; see ``dropout_add_layer_norm``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_factor(
    seed_ptr,
    ids_ptr,
    row,  # (BLOCK_ROWS, 1) int64
    rows,
    threshold,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STREAM: tl.constexpr,
):
    """The factor of dropout, 0 or scale, (BLOCK_ROWS, BLOCK_COLUMNS) float32, as reference.feature_dropout_keep says:
    column 8 g + 2 w + h takes half h of word w of counter (row, g); an id stands for the row where there are ids."""
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS // 8), dtype=tl.int32)
    group = zero + tl.arange(0, BLOCK_COLUMNS // 8)[None, :]
    last = zero
    if ids_ptr is not None:
        row = tl.load(ids_ptr + row, mask=row < rows, other=0)
        last += (row >> 32).to(tl.int32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr), group, zero + row.to(tl.int32), zero + STREAM, last, n_rounds=7
    )
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    halves = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    return tl.where(tl.reshape(halves, (BLOCK_ROWS, BLOCK_COLUMNS)) >= threshold, scale, 0.0)


@triton.jit
def dropped_sum(
    x_ptr,
    residual_ptr,
    x_bias_ptr,
    seed_ptr,
    ids_ptr,
    row,  # (BLOCK_ROWS, 1) int64
    column,  # (1, BLOCK_COLUMNS)
    rows,
    columns,
    threshold,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STREAM: tl.constexpr,
):
    """residual + dropout(x + x_bias) and the factor of dropout (0 or scale), float32; 0 outside."""
    inside = (row < rows) & (column < columns)
    offset = row * columns + column
    total = tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        x += tl.load(x_bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        factor = dropout_factor(
            seed_ptr, ids_ptr, row, rows, threshold, scale, BLOCK_ROWS, BLOCK_COLUMNS, STREAM
        )  # fmt: skip
        # Not a product: a dropped element must not show, even if it is NaN.
        x = tl.where(factor > 0.0, x * factor, 0.0)
    else:
        factor = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), 1.0, dtype=tl.float32)
    return tl.where(inside, total + x, 0.0), factor


@triton.jit
def layer_norm(total, inside, weight_ptr, bias_ptr, column, columns, eps):
    """The norm of float32 rows that are 0 outside, and their mean and 1 / deviation."""
    mean = tl.sum(total, axis=1, keep_dims=True) / columns
    centred = tl.where(inside, total - mean, 0.0)
    # A mean of 1000 is off by its own rounding, 6e-5, which every output would show; what it left is taken off.
    left = tl.sum(centred, axis=1, keep_dims=True) / columns
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / columns - left * left
    # Equal values of 1e9 could leave it below zero by its rounding.
    rstd = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    return (centred - left) * rstd * weight + bias, mean, rstd


@triton.jit
def layer_norm_gradient(grad_out, total, weight, mean, rstd, inside, columns):
    """The gradient of the rows that were normalised, and these rows normalised; float32, 0 outside."""
    normal = tl.where(inside, (total - mean) * rstd, 0.0)
    grad_normal = grad_out * weight
    # What rounding the mean left is taken off, as in the forward; sums that wait for none of the others.
    left = tl.sum(normal, axis=1, keep_dims=True) / columns
    common = tl.sum(grad_normal, axis=1, keep_dims=True) / columns
    along = tl.sum(grad_normal * normal, axis=1, keep_dims=True) / columns - left * common
    normal -= left
    return tl.where(inside, (grad_normal - common - normal * along) * rstd, 0.0), normal
