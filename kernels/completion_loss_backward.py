"""Completion loss, gradient of the features: weights of a strip of rows, their product with the other side, the rest.

With G_ij the gradient of the loss by the similarity s_ij (j other than i), the gradient of a row is
sum_j G_ij y_j / |y_j| - pull_i y_i / |y_i|, projected away from the row: pull_i = sum of the row's and the column's
softmax over the other pairs, taken from the statistics, so that a confident positive cancels nothing, and added in
float32. G is held for a strip of rows at a time (``WORKSPACE`` elements, of the launch configuration), and cuBLAS
multiplies it. Each element of a similarity is computed once for each side, whatever D is: 4 N M D operations a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.completion_loss_tiles import (
    EXCLUDED,
    bytes_of,
    columns_valid,
    dots,
    entry,
    negatives,
    rows_taking_part,
)
from sclkern.kernels.config import Configs, Features, LaunchConfig, of_kernel, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.launch import Prepared


@triton.jit(do_not_specialize=["count"])
def completion_loss_anchor_kernel(
    grad_ptr,  # (G N,) float32, of the losses
    valid_ptr,  # (G N,) uint8 or None
    positive_ptr,  # (G N,) float32
    lse_ptr,  # (directions, G N) float32
    weight_ptr,  # (directions, G N) float32: grad sigmoid(lse - positive)
    count,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    takes_part = rows_taking_part(valid_ptr, row, row < count)
    at = tl.program_id(1).to(tl.int64) * count + row
    grad = tl.load(grad_ptr + row, mask=takes_part, other=0.0)
    difference = tl.load(lse_ptr + at, mask=takes_part, other=0.0)
    difference -= tl.load(positive_ptr + row, mask=takes_part, other=0.0)
    tl.store(weight_ptr + at, grad * tl.sigmoid(difference), mask=row < count)


@triton.jit(do_not_specialize=["x_length", "y_length", "offset", "rows", "blocks", "strip", "eighths"])
def completion_loss_weights_kernel(
    x_ptr,  # (G, X, D), whose gradient this is
    y_ptr,  # (G, Y, D)
    x_valid_ptr,  # (G, X) uint8 or None
    y_valid_ptr,  # (G, Y) uint8 or None
    same_ptr,  # (M,) int64 or None
    temperature_ptr,  # (1,) float32
    x_rnorm_ptr,  # (G, X) float32
    y_rnorm_ptr,  # (G, Y) float32
    x_weight_ptr,  # (G, X) float32, or None where x are no anchors: grad sigmoid(lse - positive), 0 if not valid
    y_weight_ptr,  # (G, Y) float32, or None where y are no anchors
    x_lse_ptr,  # (G, X) float32 or None
    y_lse_ptr,  # (G, Y) float32 or None
    scale_ptr,  # (G, X) float32 or None: what the weights of a row of x are divided by
    weights_ptr,  # (G, strip, 8 eighths): G_ij / |y_j|
    x_length,
    y_length,
    offset,
    rows,
    blocks,
    strip,
    eighths,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = (tl.program_id(0) // blocks).to(tl.int64)
    x_base, y_base = group * x_length, group * y_length
    x_start = (tl.program_id(0) % blocks) * BLOCK_X
    x = x_start + tl.arange(0, BLOCK_X)
    x_row = x_base + offset + x
    x_in = rows_taking_part(x_valid_ptr, x_row, x < rows)
    y_start = tl.program_id(1) * BLOCK_Y
    y = y_start + tl.arange(0, BLOCK_Y)
    y_row = y_base + y
    y_in = rows_taking_part(y_valid_ptr, y_row, y < y_length)
    x_ptr += (x_base + offset + x_start) * WIDTH
    y_ptr += (y_base + y_start) * WIDTH
    similarity = dots(x_ptr, y_ptr, x_in, y_in, WIDTH, BLOCK_X, BLOCK_Y, BLOCK_K)
    x_scale = tl.load(x_rnorm_ptr + x_row, mask=x < rows, other=0.0) / tl.load(temperature_ptr)
    y_rnorm = tl.load(y_rnorm_ptr + y_row, mask=y < y_length, other=0.0)
    similarity = similarity * x_scale[:, None] * y_rnorm[None, :]
    weight = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    if x_weight_ptr is not None:
        x_weight = tl.load(x_weight_ptr + x_row, mask=x < rows, other=0.0)
        x_lse = tl.load(x_lse_ptr + x_row, mask=x < rows, other=0.0)
        weight += x_weight[:, None] * tl.exp(similarity - x_lse[:, None])
    if y_weight_ptr is not None:
        y_weight = tl.load(y_weight_ptr + y_row, mask=y < y_length, other=0.0)
        y_lse = tl.load(y_lse_ptr + y_row, mask=y < y_length, other=0.0)
        weight += y_weight[None, :] * tl.exp(similarity - y_lse[None, :])
    counts = (x_scale > 0)[:, None] & (y_rnorm > 0)[None, :] & ((offset + x)[:, None] != y[None, :])
    counts = negatives(same_ptr, offset + x, y, x < rows, y < y_length, counts)
    weight = tl.where(counts, weight * y_rnorm[None, :], 0.0)
    if scale_ptr is not None:
        # Those of a feature of zeros may be larger than float16 holds, and are multiplied by its zeros.
        weight /= tl.load(scale_ptr + x_row, mask=x < rows, other=1.0)[:, None]
        weight = tl.minimum(tl.maximum(weight, -65504.0), 65504.0)
    # A product with 8, so that the compiler knows that rows are aligned to 16 bytes.
    stride = eighths * 8
    out = weights_ptr + (group * strip + x_start) * stride + y_start
    out += tl.arange(0, BLOCK_X)[:, None] * stride + tl.arange(0, BLOCK_Y)[None, :]
    tl.store(out, weight.to(weights_ptr.dtype.element_ty), mask=(x < rows)[:, None] & (y < y_length)[None, :])


@triton.jit(do_not_specialize=["count", "x_length", "y_length", "offset", "rows", "window", "window_offset"])
def completion_loss_finish_kernel(
    x_ptr,  # (G, X, D), whose gradient this is
    y_ptr,  # (G, Y, D)
    x_valid_ptr,  # (G, X) uint8 or None
    temperature_ptr,  # (1,) float32
    x_rnorm_ptr,  # (G, X) float32
    y_rnorm_ptr,  # (G, Y) float32
    x_weight_ptr,  # (G, X) float32 or None
    y_weight_ptr,  # (G, Y) float32 or None
    scale_ptr,  # (G, X) float32 or None
    push_ptr,  # (G, rows, D) float32: the weights times y
    grad_x_ptr,  # (G, window, D)
    count,
    x_length,
    y_length,
    offset,
    rows,
    window,
    window_offset,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < count
    anchor_row = (row // rows) * x_length + offset + row % rows
    takes_part = rows_taking_part(x_valid_ptr, anchor_row, inside)
    # Columns from y_length on belong to no row.
    paired = takes_part & (offset + row % rows < y_length)
    partner = (row // rows) * y_length + offset + row % rows
    temperature = tl.load(temperature_ptr)
    x_rnorm = tl.load(x_rnorm_ptr + anchor_row, mask=takes_part, other=0.0)
    y_rnorm = tl.load(y_rnorm_ptr + partner, mask=paired, other=0.0)
    pull = tl.zeros((BLOCK_ROWS,), tl.float32)
    if x_weight_ptr is not None:
        pull += tl.load(x_weight_ptr + anchor_row, mask=paired, other=0.0)
    if y_weight_ptr is not None:
        pull += tl.load(y_weight_ptr + partner, mask=paired, other=0.0)
    scale = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + anchor_row, mask=takes_part, other=1.0)
    radial = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        d = start + tl.arange(0, BLOCK_WIDTH)
        mask = takes_part[:, None] & (d < WIDTH)[None, :]
        x = tl.load(x_ptr + anchor_row[:, None] * WIDTH + d[None, :], mask=mask, other=0.0).to(tl.float32)
        y_mask = paired[:, None] & (d < WIDTH)[None, :]
        y = tl.load(y_ptr + partner[:, None] * WIDTH + d[None, :], mask=y_mask, other=0.0).to(tl.float32)
        push = tl.load(push_ptr + row[:, None] * WIDTH + d[None, :], mask=mask, other=0.0) * scale[:, None]
        radial += tl.sum((push - (pull * y_rnorm)[:, None] * y) * x, axis=1)
    # A norm below eps was replaced by eps, a constant: nothing to project away.
    radial = tl.where(x_rnorm < 1.0 / eps, radial * x_rnorm * x_rnorm, 0.0)
    out = ((row // rows) * window + window_offset + row % rows) * WIDTH
    for start in range(0, WIDTH, BLOCK_WIDTH):
        d = start + tl.arange(0, BLOCK_WIDTH)
        mask = takes_part[:, None] & (d < WIDTH)[None, :]
        x = tl.load(x_ptr + anchor_row[:, None] * WIDTH + d[None, :], mask=mask, other=0.0).to(tl.float32)
        y_mask = paired[:, None] & (d < WIDTH)[None, :]
        y = tl.load(y_ptr + partner[:, None] * WIDTH + d[None, :], mask=y_mask, other=0.0).to(tl.float32)
        push = tl.load(push_ptr + row[:, None] * WIDTH + d[None, :], mask=mask, other=0.0) * scale[:, None]
        grad_x = push - (pull * y_rnorm)[:, None] * y - radial[:, None] * x
        grad_x *= (x_rnorm / temperature)[:, None]
        mask = inside[:, None] & (d < WIDTH)[None, :]
        tl.store(grad_x_ptr + out[:, None] + d[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _row_scale(x_weight: Tensor | None, y_weight: Tensor | None, x_rnorm: Tensor, y_rnorm: Tensor) -> Tensor:
    """(G, X): brings the weights of each row below 2^14, because those of confident positives lie below float16's
    smallest number."""
    bound = 0.0 if x_weight is None else x_weight.abs()
    if y_weight is not None:
        bound = bound + y_weight.abs().amax(-1, keepdim=True).expand(x_rnorm.shape)
    # A nonzero float16 feature is at least 2^-24 long; what belongs to zeros adds nothing.
    bound = bound * y_rnorm.masked_fill(y_rnorm > 2.0**24, 0.0).amax(-1, keepdim=True) / 2.0**14
    return bound.masked_fill(bound == 0, 1.0)


def _product(weights: Tensor, features: Tensor) -> Tensor:
    if weights.is_cuda and weights.dtype != torch.float32:
        return torch.bmm(weights, features, out_dtype=torch.float32)
    return torch.bmm(weights.float(), features.float())


def completion_loss_anchors(
    grad: Tensor, valid: Tensor | None, positive: Tensor, lse: Tensor, config: LaunchConfig | None = None
) -> Tensor:
    """(directions, G, N) float32: how far each term of the loss is from 0 as its gradient sees it."""
    weight = torch.empty_like(lse)
    if weight.numel():
        launch = _prepare_anchors(config, lse.device, grad.numel(), len(lse))
        launch(grad, bytes_of(valid), positive, lse, weight)
    return weight


@settled
def _prepare_anchors(config: LaunchConfig | None, device: torch.device, count: int, directions: int) -> Prepared:
    (chosen,) = resolve(config, ("completion_loss_anchor_kernel",), Features(torch.float32, device))
    grid = ceil_div(count, chosen["BLOCK_ROWS"]), directions
    return Prepared(completion_loss_anchor_kernel, grid, chosen, count=count)


def completion_loss_gradient(
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    x_valid: Tensor | None,
    y_valid: Tensor | None,
    same: Tensor | None,
    x_weight: Tensor | None,
    y_weight: Tensor | None,
    x_lse: Tensor | None,
    y_lse: Tensor | None,
    x_rnorm: Tensor,
    y_rnorm: Tensor,
    eps: float,
    offset: int,
    rows: int,
    config: Configs = None,
) -> Tensor:
    """Gradient (G, rows, D) of the window of x (G, X, D) in its dtype, by the similarities with y (G, Y, D); weight
    and lse, (G, X) and (G, Y), of a direction that is not wanted are None, and of columns that belong to no row 0 and
    so high that nothing is left. Features whose rnorm is at least 1 / eps are not projected. For float32,
    ``torch.backends.cuda.matmul`` decides on TF32 in the product of weights and features alone."""
    groups, _, width = x.shape
    length = y.shape[1]
    grad_x = x.new_empty((groups, rows, width))
    if not grad_x.numel() or not length:
        return grad_x.zero_()
    given = config if config is None or isinstance(config, LaunchConfig) else tuple(config)
    scale = _row_scale(x_weight, y_weight, x_rnorm, y_rnorm) if x.dtype == torch.float16 else None
    workspace, parts = _prepare(given, x.dtype, x.device, x.shape, length, eps, offset, rows)
    weights = x.new_empty(workspace)
    # Weights of 0 do not silence NaN in a row that takes no part.
    features = y if y_valid is None else y.masked_fill(~y_valid[..., None], 0.0)
    masks = bytes_of(x_valid), bytes_of(y_valid)
    for group, count, height, weigh, finish in parts:
        # A view takes as long as a launch.
        per_row: Sequence[Any] = x, y, *masks, x_rnorm, y_rnorm, x_weight, y_weight, scale, x_lse, y_lse, features
        per_row = *per_row, grad_x
        if count < groups:
            per_row = [None if tensor is None else tensor[group : group + count] for tensor in per_row]
        left, right, left_valid, right_valid, left_rnorm, right_rnorm, *rest, of_y, out = per_row
        left_weight, right_weight, scale_of, left_lse, right_lse = rest
        common = temperature, left_rnorm, right_rnorm, left_weight, right_weight
        weigh(left, right, left_valid, right_valid, same, *common, left_lse, right_lse, scale_of, weights)
        written = weights if weights.shape == (count, height, length) else weights[:count, :height, :length]
        finish(left, right, left_valid, *common, scale_of, _product(written, of_y), out)
    return grad_x


def completion_loss_backward(
    grad: Tensor,
    recovered: Tensor,
    complete: Tensor,
    temperature: Tensor,
    valid: Tensor | None,
    same: Tensor | None,
    positive: Tensor,
    lse: Tensor,
    rnorms: tuple[Tensor, Tensor],
    normalize: bool,
    eps: float,
    windows: Sequence[Sequence[tuple[int, int]]],
) -> tuple[Tensor, list[Tensor]]:
    """How far each term of the loss is from 0, and the gradients of the windows (offset, rows) of recovered (G, N, D)
    and of complete (G, M, D), one after the other; of a side without a window empty."""
    weight = completion_loss_anchors(grad.contiguous(), valid, positive, lse)
    further = complete.shape[1] - recovered.shape[1]
    # A view takes as long as a launch.
    sides: list[Any] = [(*t.unbind(), None)[:2] for t in (weight, lse)]
    if further and len(lse) == 2:
        sides = [
            (of_rows, F.pad(t, (0, further), value=v))
            for (of_rows, t), v in zip(sides, (0.0, -EXCLUDED.value), strict=True)
        ]
    features, masks = (recovered, complete), (valid, columns_valid(valid, complete.shape[1]))
    gradients: list[Tensor] = []
    for side, of_side in enumerate(windows):
        of_features, of_masks, *statistics = (pair[:: 1 - 2 * side] for pair in (features, masks, *sides, rnorms))
        arguments: list[Any] = [*of_features, temperature, *of_masks, same, *(t for pair in statistics for t in pair)]
        # With an eps of 1, features that were not normalised are not projected.
        smallest = eps if normalize else 1.0
        parts = [completion_loss_gradient(*(*arguments, smallest, *window)) for window in of_side]
        gradients.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1) if parts else recovered.new_empty(0))
    return weight, gradients


@settled
def _prepare(
    config: Configs, dtype: torch.dtype, device: torch.device, shape: torch.Size, length: int, eps: float, offset: int,
    rows: int,
) -> tuple[tuple[int, ...], list[tuple[int, int, int, Prepared, Prepared]]]:  # fmt: skip
    """Shape of the workspace; of each part its first group, its groups, its rows, and the two launches."""
    groups, x_length, width = shape
    names = ("completion_loss_weights_kernel", "completion_loss_finish_kernel")
    configs = resolve(config, names, Features(dtype, device))
    weighing, finish = (of_kernel(configs, name) for name in names)
    block_x = weighing["BLOCK_X"]
    strip = min(rows, max(1, weighing["WORKSPACE"] // length // block_x) * block_x)
    together = min(groups, max(1, weighing["WORKSPACE"] // (strip * length)))
    # Rows of the workspace on 16 bytes, for cuBLAS.
    eighths = ceil_div(length, 8)
    parts = []
    for group in range(0, groups, together):
        count = min(together, groups - group)
        for start in range(0, rows, strip):
            height = min(strip, rows - start)
            blocks = ceil_div(height, block_x)
            sizes = {"x_length": x_length, "y_length": length, "WIDTH": width, "offset": offset + start, "rows": height}
            grid = blocks * count, ceil_div(length, weighing["BLOCK_Y"])
            of_strip = {"blocks": blocks, "strip": strip, "eighths": eighths}
            weigh = Prepared(completion_loss_weights_kernel, grid, weighing, **sizes, **of_strip)
            in_window = {"count": count * height, "window": rows, "window_offset": start, "eps": eps}
            rows_grid = (ceil_div(count * height, finish["BLOCK_ROWS"]),)
            write = Prepared(completion_loss_finish_kernel, rows_grid, finish, **sizes, **in_window)
            parts.append((group, count, height, weigh, write))
    return (together, strip, eighths * 8), parts


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    anchor, half, finish = select("completion_loss", "backward", torch.bfloat16, arch)
    _, single, _ = select("completion_loss", "backward", torch.float32, arch)
    return [
        entry(completion_loss_anchor_kernel, anchor, "bf16"),
        entry(completion_loss_weights_kernel, half, "bf16", x_valid_ptr=None, y_valid_ptr=None, scale_ptr=None),
        entry(completion_loss_weights_kernel, half, "fp16"),
        entry(completion_loss_weights_kernel, single, "fp32", scale_ptr=None),
        entry(
            completion_loss_weights_kernel, half, "bf16", same=True, x_valid_ptr=None, y_valid_ptr=None, scale_ptr=None
        ),
        entry(completion_loss_weights_kernel, half, "fp16", same=True),
        entry(completion_loss_weights_kernel, single, "fp32", same=True, scale_ptr=None),
        entry(completion_loss_finish_kernel, finish, "bf16", scale_ptr=None),
    ]
