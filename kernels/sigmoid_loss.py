"""Sigmoid loss in tiles, forward and gradient of the features; N x N is never stored.

N images and N texts of D features, contiguous. A launch computes a window of the rows, all N where one process has them
all; row i of the window is row offset + i, and matches that row of the other side. Sums in float32 and a fixed order.

No row needs another's: what the gradient by scale and bias needs is added up in the forward, and the backward only
computes, for each side, the slopes of a strip of rows (``WORKSPACE`` elements), which cuBLAS multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.completion_loss import softplus
from sclkern.kernels.completion_loss_tiles import dots
from sclkern.kernels.config import Features, LaunchConfig, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.launch import Prepared, static_entry

FORWARD, SLOPES = "sigmoid_loss_forward_kernel", "sigmoid_loss_slopes_kernel"
# Slopes of confident pairs lie below float16's smallest number; a power of two, exact in every dtype.
RAISED = 2.0**14


@triton.jit
def _logits(
    x_ptr, y_ptr, scale_ptr, bias_ptr, x, y, x_in, y_in,
    WIDTH: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products and logits of a tile, logits of pairs that match negated, and which those are."""
    products = dots(x_ptr, y_ptr, x_in, y_in, WIDTH, BLOCK_X, BLOCK_Y, BLOCK_K)
    logits = products * tl.load(scale_ptr) + tl.load(bias_ptr)
    matches = x[:, None] == y[None, :]
    return products, tl.where(matches, -logits, logits), matches


@triton.jit(do_not_specialize=["length", "offset", "rows", "split_columns"])
def sigmoid_loss_forward_kernel(
    image_ptr,  # (N, D), of which the window is computed
    text_ptr,  # (N, D)
    scale_ptr,  # (1,) float32
    bias_ptr,  # (1,) float32
    sums_ptr,  # (3, splits, rows) float32: of losses, of slopes times products, of slopes, over columns of a split
    length,
    offset,
    rows,
    split_columns,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_X
    x = start + tl.arange(0, BLOCK_X)
    x_in = x < rows
    image_ptr += (offset + start) * WIDTH
    losses = tl.zeros((BLOCK_X,), tl.float32)
    by_scale = tl.zeros((BLOCK_X,), tl.float32)
    by_bias = tl.zeros((BLOCK_X,), tl.float32)
    first = tl.program_id(1) * split_columns
    last = tl.minimum(first + split_columns, length)
    for column in range(first, last, BLOCK_Y):
        y = column + tl.arange(0, BLOCK_Y)
        y_in = y < last
        tile_ptr = text_ptr + tl.cast(column, tl.int64) * WIDTH
        products, logits, matches = _logits(
            image_ptr, tile_ptr, scale_ptr, bias_ptr, offset + x, y, x_in, y_in, WIDTH, BLOCK_X, BLOCK_Y, BLOCK_K
        )
        counts = x_in[:, None] & y_in[None, :]
        slopes = tl.where(counts, tl.sigmoid(logits), 0.0)
        slopes = tl.where(matches, -slopes, slopes)
        losses += tl.sum(tl.where(counts, softplus(logits), 0.0), axis=1)
        by_scale += tl.sum(slopes * products, axis=1)
        by_bias += tl.sum(slopes, axis=1)
    out = sums_ptr + tl.program_id(1).to(tl.int64) * rows + x
    stride = tl.num_programs(1).to(tl.int64) * rows
    tl.store(out, losses, mask=x_in)
    tl.store(out + stride, by_scale, mask=x_in)
    tl.store(out + 2 * stride, by_bias, mask=x_in)


@triton.jit(do_not_specialize=["length", "offset", "rows", "eighths"])
def sigmoid_loss_slopes_kernel(
    x_ptr,  # (N, D), whose gradient this is
    y_ptr,  # (N, D)
    scale_ptr,  # (1,) float32
    bias_ptr,  # (1,) float32
    slopes_ptr,  # (rows, 8 eighths): derivative of the loss of a pair by its logit, times RAISED
    length,
    offset,
    rows,
    eighths,
    RAISED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    x_start, y_start = tl.program_id(0).to(tl.int64) * BLOCK_X, tl.program_id(1).to(tl.int64) * BLOCK_Y
    x, y = x_start + tl.arange(0, BLOCK_X), y_start + tl.arange(0, BLOCK_Y)
    x_in, y_in = x < rows, y < length
    x_ptr += (offset + x_start) * WIDTH
    y_ptr += y_start * WIDTH
    _, logits, matches = _logits(
        x_ptr, y_ptr, scale_ptr, bias_ptr, offset + x, y, x_in, y_in, WIDTH, BLOCK_X, BLOCK_Y, BLOCK_K
    )
    slopes = tl.sigmoid(logits)
    slopes = tl.where(matches, -slopes, slopes) * RAISED
    # A product with 8, so that the compiler knows that rows are aligned to 16 bytes.
    stride = eighths * 8
    out = slopes_ptr + x_start * stride + y_start
    out += tl.arange(0, BLOCK_X)[:, None] * stride + tl.arange(0, BLOCK_Y)[None, :]
    tl.store(out, slopes.to(slopes_ptr.dtype.element_ty), mask=x_in[:, None] & y_in[None, :])


def sigmoid_loss_forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    rows: int,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """image, text (N, D) contiguous; scale, bias () float32. What the rows of the window add to the mean over all N
    rows: the loss, and its derivatives by scale and by bias, () float32."""
    length, width = image.shape
    if not rows:
        return scale.new_zeros(()), scale.new_zeros(()), scale.new_zeros(())
    launch, splits = _prepare_forward(config, image.dtype, image.device, length, width, offset, rows)
    sums = scale.new_empty((3, splits, rows))
    launch(image, text, scale, bias, sums)
    loss, by_scale, by_bias = (part.sum() / length for part in sums.unbind())
    return loss, by_scale, by_bias


@settled
def _prepare_forward(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, length: int, width: int, offset: int,
    rows: int,
) -> tuple[Prepared, int]:  # fmt: skip
    (chosen,) = resolve(config, (FORWARD,), Features(dtype, device))
    blocks, columns = ceil_div(rows, chosen["BLOCK_X"]), ceil_div(length, chosen["BLOCK_Y"])
    # Columns are split until there are so many programs; a constant of the table, so that sums have a fixed order.
    split_blocks = ceil_div(columns, min(columns, ceil_div(chosen["PROGRAMS"], blocks)))
    splits = ceil_div(columns, split_blocks)
    sizes = {"length": length, "offset": offset, "rows": rows, "WIDTH": width}
    sizes |= {"split_columns": split_blocks * chosen["BLOCK_Y"]}
    return Prepared(sigmoid_loss_forward_kernel, (blocks, splits), chosen, **sizes), splits


def sigmoid_loss_gradient(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    factor: Tensor,
    offset: int,
    rows: int,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Gradient (rows, D) of the window of x (N, D) in its dtype: the slopes times y, times factor ()."""
    length, width = y.shape
    grad = x.new_empty((rows, width))
    if not grad.numel():
        return grad
    together, parts = _prepare_slopes(config, x.dtype, x.device, length, width, offset, rows)
    slopes = x.new_empty((together, ceil_div(length, 8) * 8))
    factor = factor / RAISED
    half = x.is_cuda and x.dtype != torch.float32
    for start, height, launch in parts:
        launch(x, y, scale, bias, slopes)
        written = slopes[:height, :length]
        product = torch.mm(written, y, out_dtype=torch.float32) if half else written.float() @ y.float()
        torch.mul(product, factor, out=product)
        grad[start : start + height] = product
    return grad


@settled
def _prepare_slopes(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, length: int, width: int, offset: int,
    rows: int,
) -> tuple[int, list[tuple[int, int, Prepared]]]:  # fmt: skip
    """Rows of the workspace; of each strip its first row, its rows, and its launch."""
    (chosen,) = resolve(config, (SLOPES,), Features(dtype, device))
    block = chosen["BLOCK_X"]
    together = min(rows, max(1, chosen["WORKSPACE"] // length // block) * block)
    parts = []
    for start in range(0, rows, together):
        height = min(together, rows - start)
        # Rows of the workspace on 16 bytes, for cuBLAS.
        sizes = {"length": length, "offset": offset + start, "rows": height, "eighths": ceil_div(length, 8)}
        sizes |= {"WIDTH": width}
        grid = ceil_div(height, block), ceil_div(length, chosen["BLOCK_Y"])
        parts.append((start, height, Prepared(sigmoid_loss_slopes_kernel, grid, chosen, RAISED=RAISED, **sizes)))
    return together, parts


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    entries = []
    for pass_, kernel in (("forward", sigmoid_loss_forward_kernel), ("backward", sigmoid_loss_slopes_kernel)):
        constants: dict[str, Any] = {"WIDTH": 768} | ({"RAISED": RAISED} if pass_ == "backward" else {})
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            (config,) = select("sigmoid_loss", pass_, dtype, arch)
            signature = dict.fromkeys(("image_ptr", "text_ptr", "x_ptr", "y_ptr", "slopes_ptr"), f"*{name}")
            signature |= dict.fromkeys(("scale_ptr", "bias_ptr", "sums_ptr"), "*fp32")
            entries.append(static_entry(kernel, config, signature, **constants))
    return entries
