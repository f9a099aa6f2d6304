"""Cross-entropy over the logits of a linear layer: statistics of each row, and the gradient of the logits.

R rows, V vocabulary, W = V rounded up to ``ALIGNMENT``, the columns of a buffer of logits. The products are cuBLAS's;
the bias is added here. Arithmetic in float32, whatever the logits hold.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.completion_loss import softplus
from sclkern.kernels.config import Features, LaunchConfig, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.launch import Prepared, static_entry

# Columns of 128 bytes in bfloat16. V itself may be odd: cuBLAS then takes its kernels for unaligned operands, and
# Triton loads of 2 bytes.
ALIGNMENT = tl.constexpr(64)

# Not minus infinity, whose differences are NaN; far below any logit.
EXCLUDED = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["columns"])
def linear_cross_entropy_rows_kernel(
    logits_ptr,  # (R, W), without the bias; the columns from V on become zeros
    bias_ptr,  # (W,) or None
    labels_ptr,  # (R,) int64
    losses_ptr,  # (R,) float32
    lse_ptr,  # (R,) float32
    margin_ptr,  # (R,) float32: log-sum-exp over the other tokens - logit of the label
    hits_ptr,  # (R,) int32: whether the arg max is the label
    columns,
    width,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * width
    label = tl.load(labels_ptr + row)
    known = (label >= 0) & (label < columns)
    ignored = label == ignore_index
    positive = tl.load(logits_ptr + label, mask=known, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        positive += tl.load(bias_ptr + label, mask=known, other=0.0).to(tl.float32)
    # A maximum and a sum in each lane, merged once: the loop needs no barrier and one exponential an element.
    maximum = tl.full((BLOCK,), EXCLUDED, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    before = tl.full((BLOCK,), EXCLUDED, tl.float32)
    # An ignored row is not read at all.
    for start in range(0, tl.where(ignored, 0, width), BLOCK):
        column = start + tl.arange(0, BLOCK)
        # Loads reach to the padded width, a multiple of 16, or they would be of single elements.
        logit = tl.load(logits_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            logit += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        logit = tl.where((column < columns) & (column != label), logit, EXCLUDED)
        before = tl.maximum(before, tl.where(column < label, logit, EXCLUDED))
        smaller = tl.exp(-tl.abs(logit - maximum))
        total = tl.where(logit > maximum, total * smaller + 1.0, total + smaller)
        maximum = tl.maximum(maximum, logit)
    largest = tl.max(maximum, axis=0)
    others = largest + tl.log(tl.sum(total * tl.exp(maximum - largest), axis=0))
    # From the other tokens, not lse - positive, which cancels where the label is confident.
    margin = others - positive
    loss = softplus(margin)
    lse = tl.maximum(others, positive) + softplus(-tl.abs(margin))
    hit = known & (positive > tl.max(before, axis=0)) & (positive >= largest)
    # A label that is none makes its loss NaN, where it can be seen.
    loss, lse = tl.where(known, loss, float("nan")), tl.where(known, lse, float("nan"))
    # Never used, but the buffer is an output of the op: whatever lay there would differ from run to run.
    rest = columns + tl.arange(0, ALIGNMENT)
    tl.store(logits_ptr + rest, tl.zeros((ALIGNMENT,), logits_ptr.dtype.element_ty), mask=rest < width)
    tl.store(losses_ptr + row, tl.where(ignored, 0.0, loss))
    tl.store(lse_ptr + row, tl.where(ignored, 0.0, lse))
    tl.store(margin_ptr + row, tl.where(ignored, 0.0, margin))
    tl.store(hits_ptr + row, tl.where(ignored, 0, hit.to(tl.int32)))


@triton.jit(do_not_specialize=["rows"])
def linear_cross_entropy_reduce_kernel(
    losses_ptr,  # (R,) float32
    hits_ptr,  # (R,) int32
    labels_ptr,  # (R,) int64
    loss_ptr,  # (1,) float32
    count_ptr,  # (1,) float32: rows that are not ignored, at least 1
    hit_count_ptr,  # (1,) int64
    rows,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    hits = tl.zeros((BLOCK,), tl.int64)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        total += tl.load(losses_ptr + row, mask=inside, other=0.0)
        hits += tl.load(hits_ptr + row, mask=inside, other=0)
        count += (tl.load(labels_ptr + row, mask=inside, other=ignore_index) != ignore_index).to(tl.int32)
    divisor = tl.maximum(tl.sum(count, axis=0), 1).to(tl.float32)
    loss = tl.sum(total, axis=0)
    tl.store(loss_ptr, loss / divisor if MEAN else loss)
    tl.store(count_ptr, divisor)
    tl.store(hit_count_ptr, tl.sum(hits, axis=0))


@triton.jit(do_not_specialize=["rows", "columns", "first_column"])
def linear_cross_entropy_gradient_kernel(
    grad_ptr,  # (R,) or, with a stride of 0, () float32: of the losses, or of the reduced loss
    count_ptr,  # () float32 or None: what the gradient is divided by
    logits_ptr,  # (R, W), without the bias
    bias_ptr,  # (V,) or None
    labels_ptr,  # (R,) int64
    lse_ptr,  # (R,) float32
    margin_ptr,  # (R,) float32
    grad_logits_ptr,  # (R, W)
    grad_bias_ptr,  # (V,) or None
    rows,
    columns,
    first_column,  # of the whole vocabulary
    width,
    grad_stride,
    ignore_index,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    bias = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    divisor = 1.0
    if count_ptr is not None:
        divisor = tl.load(count_ptr)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        label = tl.load(labels_ptr + row, mask=inside, other=ignore_index)
        used = label != ignore_index
        scale = tl.load(grad_ptr + row * grad_stride, mask=used, other=0.0) / divisor
        lse = tl.load(lse_ptr + row, mask=used, other=0.0)
        margin = tl.load(margin_ptr + row, mask=used, other=0.0)
        offset = row[:, None] * width + column[None, :]
        logit = tl.load(logits_ptr + offset, mask=used[:, None] & (column < width)[None, :], other=0.0)
        share = tl.exp(logit.to(tl.float32) + bias[None, :] - lse[:, None])
        # softmax - 1 of the label, from the sum over the others.
        is_label = column[None, :] + first_column == label[:, None]
        share = tl.where(is_label, tl.where(lse == lse, -tl.sigmoid(margin), lse)[:, None], share)
        grad = tl.where(used[:, None] & (column < columns)[None, :], share * scale[:, None], 0.0)
        stored = inside[:, None] & (column < width)[None, :]
        tl.store(grad_logits_ptr + offset, grad.to(grad_logits_ptr.dtype.element_ty), mask=stored)
        sums += grad
    if grad_bias_ptr is not None:
        grad_bias = tl.sum(sums, axis=0).to(grad_bias_ptr.dtype.element_ty)
        tl.store(grad_bias_ptr + column, grad_bias, mask=column < columns)


def statistics(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    losses: Tensor,
    lse: Tensor,
    margin: Tensor,
    hits: Tensor,
    columns: int,
    config: LaunchConfig | None = None,
) -> None:
    """Fill losses, lse, margin (R,) float32 and hits (R,) int32 from logits (R, W) contiguous, bias (W,) and labels."""
    if logits.shape[0]:
        launch = _prepare_rows(config, logits.dtype, logits.device, logits.shape, columns, ignore_index)
        launch(logits, bias, labels, losses, lse, margin, hits)


@settled
def _prepare_rows(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, shape: torch.Size, columns: int,
    ignore_index: int,
) -> Prepared:  # fmt: skip
    (chosen,) = resolve(config, ("linear_cross_entropy_rows_kernel",), Features(dtype, device))
    numbers = {"columns": columns, "width": shape[1], "ignore_index": ignore_index}
    return Prepared(linear_cross_entropy_rows_kernel, (shape[0],), chosen, **numbers)


def reduce(
    losses: Tensor, hits: Tensor, labels: Tensor, ignore_index: int, mean: bool, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss () float32, the rows that are not ignored (at least 1) () float32, the hits () int64; in fixed order."""
    loss, count = losses.new_empty((), dtype=torch.float32), losses.new_empty((), dtype=torch.float32)
    hit_count = labels.new_empty(())
    launch = _prepare_reduce(config, losses.dtype, losses.device, losses.shape[0], ignore_index, mean)
    launch(losses, hits, labels, loss, count, hit_count)
    return loss, count, hit_count


@settled
def _prepare_reduce(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, rows: int, ignore_index: int, mean: bool
) -> Prepared:
    (chosen,) = resolve(config, ("linear_cross_entropy_reduce_kernel",), Features(dtype, device))
    numbers = {"rows": rows, "ignore_index": ignore_index, "MEAN": mean}
    return Prepared(linear_cross_entropy_reduce_kernel, (1,), chosen, **numbers)


def gradient(
    grad: Tensor,
    count: Tensor | None,
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    margin: Tensor,
    ignore_index: int,
    first_column: int,
    grad_logits: Tensor,
    grad_bias: Tensor | None,
    columns: int,
    config: LaunchConfig | None = None,
) -> None:
    """Fill grad_logits (R, W) and grad_bias (columns,) from logits (R, W), columns of the vocabulary from first_column.

    grad is that of the loss (), divided by count, or of the losses (R,) of any stride.
    """
    if logits.shape[0]:
        numbers = columns, first_column, grad.stride(0) if grad.ndim else 0, ignore_index
        launch = _prepare_gradient(config, logits.dtype, logits.device, logits.shape, *numbers)
        launch(grad, count, logits, bias, labels, lse, margin, grad_logits, grad_bias)
    elif grad_bias is not None:
        grad_bias.zero_()


@settled
def _prepare_gradient(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, shape: torch.Size, columns: int,
    first_column: int, grad_stride: int, ignore_index: int,
) -> Prepared:  # fmt: skip
    (chosen,) = resolve(config, ("linear_cross_entropy_gradient_kernel",), Features(dtype, device))
    rows, width = shape
    numbers = {"rows": rows, "columns": columns, "first_column": first_column, "width": width}
    numbers |= {"grad_stride": grad_stride, "ignore_index": ignore_index}
    grid = (ceil_div(width, chosen["BLOCK_COLUMNS"]),)
    return Prepared(linear_cross_entropy_gradient_kernel, grid, chosen, **numbers)


def _entry(kernel: Any, config: LaunchConfig, logits: str, **constants: Any) -> dict[str, Any]:
    kinds = {"labels_ptr": "*i64", "hits_ptr": "*i32", "hit_count_ptr": "*i64"}
    kinds |= {name: f"*{logits}" for name in ("logits_ptr", "bias_ptr", "grad_logits_ptr", "grad_bias_ptr")}
    kinds = {name: kinds.get(name, "*fp32") for name in kernel.arg_names if name.endswith("_ptr")}
    return static_entry(kernel, config, kinds, divisible=["width"], **constants)


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    entries: list[dict[str, Any]] = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rows, reduced = select("linear_cross_entropy", "forward", dtype, arch)
        (grads,) = select("linear_cross_entropy", "backward", dtype, arch)
        if not entries:
            entries.append(_entry(linear_cross_entropy_reduce_kernel, reduced, name, MEAN=True))
        entries.append(_entry(linear_cross_entropy_rows_kernel, rows, name))
        entries.append(_entry(linear_cross_entropy_gradient_kernel, grads, name))
    return entries
