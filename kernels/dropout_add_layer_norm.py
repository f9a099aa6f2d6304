"""LayerNorm(residual + dropout(x + x_bias)) in one pass, forward and backward, with or without that sum as an output.

R rows, D columns. Arithmetic in float32, whatever the tensors hold. A program holds whole rows in registers, so that
the variance is taken of values whose mean is already gone and each tensor is read once.

Without ``total_ptr`` the backward recomputes the sum from x, residual and the mask, and the mask from the seed. In a
transformer the residual is kept anyway, for the weight gradient of the layer that read it; keeping x then costs what
keeping the sum would, the forward writes nothing more, and the sum is never rounded to half precision.

With ``total_ptr`` the sum is written: a pre-norm block goes on with it and keeps it anyway, so the backward reads it in
place of x and residual. The norm is that of the sum as it is stored, rounded where that is half precision, so that the
backward differentiates what the forward computed.

With ``copy_ptr`` the norm is written in the dtype of x as well: what the next products read of a stream that goes on in
float32. The backward adds the gradients of both as it reads them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import Features, LaunchConfig, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.dropout_add_layer_norm_rows import dropout_factor, dropped_sum, layer_norm, layer_norm_gradient
from sclkern.kernels.launch import Prepared, static_entry
from sclkern.random import STREAM_FEATURES
from sclkern.reference import feature_dropout_scale, feature_dropout_threshold


@triton.jit
def dropout_add_layer_norm_forward_kernel(
    x_ptr,  # (R, D)
    residual_ptr,  # (R, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    x_bias_ptr,  # (D,) or None
    seed_ptr,  # int64, or None without dropout
    ids_ptr,  # (R,) int64, which key the dropout mask in place of the row, or None
    out_ptr,  # (R, D)
    total_ptr,  # (R, D), or None where the sum is not returned
    copy_ptr,  # (R, D), or None where the norm is written once
    mean_ptr,  # (R,) float32
    rstd_ptr,  # (R,) float32
    rows,
    columns,
    threshold,
    scale,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STREAM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    total, _ = dropped_sum(
        x_ptr, residual_ptr, x_bias_ptr, seed_ptr, ids_ptr, row, column, rows, columns, threshold, scale,
        BLOCK_ROWS, BLOCK_COLUMNS, STREAM,
    )  # fmt: skip
    if total_ptr is not None:
        stored = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * columns + column, stored, mask=inside)
        total = stored.to(tl.float32)
    out, mean, rstd = layer_norm(total, inside, weight_ptr, bias_ptr, column, columns, eps)
    tl.store(out_ptr + row * columns + column, out.to(out_ptr.dtype.element_ty), mask=inside)
    if copy_ptr is not None:
        tl.store(copy_ptr + row * columns + column, out.to(copy_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def dropout_add_layer_norm_backward_kernel(
    grad_out_ptr,  # (R, D)
    grad_total_ptr,  # (R, D), or None where nothing else reads the sum
    grad_copy_ptr,  # (R, D), or None
    x_ptr,  # (R, D), or None with total_ptr
    residual_ptr,  # (R, D), or None with total_ptr
    total_ptr,  # (R, D), or None where the forward did not write it
    weight_ptr,  # (D,)
    x_bias_ptr,  # (D,) or None
    seed_ptr,  # int64, or None without dropout
    ids_ptr,  # (R,) int64, which key the dropout mask in place of the row, or None
    mean_ptr,  # (R,) float32
    rstd_ptr,  # (R,) float32
    grad_x_ptr,  # (R, D), or None where it equals grad_residual
    grad_residual_ptr,  # (R, D)
    partial_ptr,  # (programs, 2 or 3, D) float32: sums over a program's rows for weight, bias and x_bias
    rows,
    columns,
    threshold,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    STREAM: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK_COLUMNS)
    column = offset[None, :]
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    grad_x_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, ROWS_PER_PROGRAM, BLOCK_ROWS):
        row = program * ROWS_PER_PROGRAM + start + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        element = row * columns + column
        if total_ptr is None:
            total, factor = dropped_sum(
                x_ptr, residual_ptr, x_bias_ptr, seed_ptr, ids_ptr, row, column, rows, columns, threshold, scale,
                BLOCK_ROWS, BLOCK_COLUMNS, STREAM,
            )  # fmt: skip
        else:
            total = tl.load(total_ptr + element, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        grad_out = tl.load(grad_out_ptr + element, mask=inside, other=0.0).to(tl.float32)
        if grad_copy_ptr is not None:
            grad_out += tl.load(grad_copy_ptr + element, mask=inside, other=0.0).to(tl.float32)
        grad_total, normal = layer_norm_gradient(grad_out, total, weight, mean, rstd, inside, columns)
        if grad_total_ptr is not None:
            grad_total += tl.load(grad_total_ptr + element, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_residual_ptr + element, grad_total.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        grad_x = grad_total
        if seed_ptr is not None:
            if total_ptr is not None:
                factor = dropout_factor(
                    seed_ptr, ids_ptr, row, rows, threshold, scale, BLOCK_ROWS, BLOCK_COLUMNS, STREAM
                )  # fmt: skip
            grad_x *= factor
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + element, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        grad_weight += grad_out * normal
        grad_bias += grad_out
        if x_bias_ptr is not None:
            grad_x_bias += grad_x
    sums: tl.constexpr = 2 if x_bias_ptr is None else 3
    partial_ptr += program * sums * columns + offset
    tl.store(partial_ptr, tl.sum(grad_weight, axis=0), mask=offset < columns)
    tl.store(partial_ptr + columns, tl.sum(grad_bias, axis=0), mask=offset < columns)
    if x_bias_ptr is not None:
        tl.store(partial_ptr + 2 * columns, tl.sum(grad_x_bias, axis=0), mask=offset < columns)


_empty_like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)


@settled
def _prepare(
    backward: bool, config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, shape: torch.Size,
    dropout_p: float, eps: float | None = None,
) -> Prepared:  # fmt: skip
    kernel = dropout_add_layer_norm_backward_kernel if backward else dropout_add_layer_norm_forward_kernel
    rows, columns = shape
    shapes = {"columns": columns, "rows": rows} if backward else {"columns": columns}
    (chosen,) = resolve(config, (kernel.fn.__name__,), Features(dtype, device), **shapes)
    programs = ceil_div(rows, chosen["ROWS_PER_PROGRAM" if backward else "BLOCK_ROWS"]) if columns else 0
    numbers: dict[str, float] = {} if eps is None else {"eps": eps}
    numbers |= {"threshold": feature_dropout_threshold(dropout_p), "scale": feature_dropout_scale(dropout_p)}
    return Prepared(kernel, (programs,), chosen, rows=rows, columns=columns, STREAM=STREAM_FEATURES, **numbers)


def dropout_add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    return_sum: bool = False,
    dropout_ids: Tensor | None = None,
    return_copy: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        x: (R, D) contiguous.
        residual: (R, D) contiguous, of any floating dtype.
        weight: (D,) contiguous.
        bias: (D,) contiguous.
        x_bias: (D,) contiguous, or None.
        seed: int64 of one element, or None for no dropout.
        dropout_p: dropout probability.
        eps: added to the variance.
        return_sum: whether the sum is written.
        dropout_ids: (R,) int64 contiguous, which key the mask in place of the row, or None.
        return_copy: whether the norm is written in the dtype of x too; not with ``return_sum``.
        config: launch configuration, None for the selected one.

    Returns:
        The norm (R, D), in the dtype of x with ``return_sum``, otherwise in the wider dtype of x and residual; the sum
        (R, D) in the wider dtype, the copy (R, D) in that of x, or None; mean and 1 / deviation of the rows (R,)
        float32.
    """
    wider = x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    out = _empty_like(x, dtype=x.dtype if return_sum else wider)
    total = _empty_like(x, dtype=wider) if return_sum else None
    mean, rstd = (x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2))
    launch = _prepare(False, config, x.dtype, x.device, x.shape, dropout_p, eps)
    copy = _empty_like(x) if return_copy else None
    launch(x, residual, weight, bias, x_bias, seed, dropout_ids, out, total, copy, mean, rstd)
    return out, copy if return_copy else total, mean, rstd


def dropout_add_layer_norm_backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    grad_copy: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    dropout_ids: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Launch the backward kernel.

    Args:
        grad_out: (R, D) contiguous, gradient of the norm.
        grad_total: (R, D) contiguous, gradient of the sum, or None.
        grad_copy: (R, D) contiguous, gradient of the copy, or None.
        x: as in the forward, or None with ``total``.
        residual: as in the forward, or None with ``total``.
        total: the sum that the forward wrote, or None.
        weight: as in the forward.
        x_bias: as in the forward.
        seed: as in the forward.
        mean: what the forward returned.
        rstd: what the forward returned.
        dropout_p: as in the forward.
        x_dtype: dtype of x.
        residual_dtype: dtype of residual.
        dropout_ids: as in the forward.
        config: launch configuration, None for the selected one.

    Returns:
        The gradients of x and of residual (R, D), in their dtypes; None for that of x where the two are equal, which is
        without dropout and with one dtype. Then those of weight, bias and, where there is one, x_bias as the rows of
        one float32 tensor (2 or 3, D).
    """
    needs_own_grad_x = seed is not None or x_dtype != residual_dtype
    grad_residual = _empty_like(grad_out, dtype=residual_dtype)
    grad_x = _empty_like(grad_out, dtype=x_dtype) if needs_own_grad_x else None
    launch = _prepare(True, config, grad_out.dtype, grad_out.device, grad_out.shape, dropout_p)
    sums = launch.grid[0], 2 if x_bias is None else 3, grad_out.shape[1]
    partial = grad_out.new_empty(sums, dtype=torch.float32)
    inputs = grad_out, grad_total, grad_copy, x, residual, total, weight, x_bias, seed, dropout_ids, mean, rstd
    launch(*inputs, grad_x, grad_residual, partial)
    return grad_x, grad_residual, partial.sum(0)


def _entries(
    arch: str, columns: int, stream: str | None, absent: tuple[str, ...], copy: bool = False
) -> list[dict[str, Any]]:
    """Both kernels for bfloat16 rows, with the sum beside a residual ``stream`` of that type, or without the sum; or
    for a ``stream`` whose norm is written in both types."""
    summed = stream is not None and not copy
    absent += () if summed else ("total_ptr", "grad_total_ptr")
    absent += () if copy else ("copy_ptr", "grad_copy_ptr")
    recomputed = ("x_ptr", "residual_ptr") if summed else ()
    branch = ("x_ptr", "out_ptr", "grad_out_ptr", "grad_x_ptr", "copy_ptr", "grad_copy_ptr")
    both = ("out_ptr", "grad_out_ptr") if copy else ()
    streams = ("residual_ptr", "total_ptr", "grad_total_ptr", "grad_residual_ptr", *both)
    singles = ("weight_ptr", "bias_ptr", "x_bias_ptr", "mean_ptr", "rstd_ptr", "partial_ptr")
    signature = dict.fromkeys(branch, "*bf16") | dict.fromkeys(streams, f"*{stream or 'bf16'}")
    signature |= dict.fromkeys(singles, "*fp32") | {"seed_ptr": "*i64", "scale": "fp32", "eps": "fp32"}
    if "seed_ptr" not in absent:
        signature["ids_ptr"] = "*i64"
    entries = []
    for pass_, kernel, names in (
        ("forward", dropout_add_layer_norm_forward_kernel, absent),
        ("backward", dropout_add_layer_norm_backward_kernel, absent + recomputed),
    ):
        (config,) = select("dropout_add_layer_norm", pass_, torch.bfloat16, arch, columns=columns)
        constants = {"STREAM": STREAM_FEATURES} | {name: None for name in names if name in kernel.arg_names}
        entry = static_entry(kernel, config, signature, divisible=["columns"], **constants)
        features = "bf16" if stream is None else f"bf16+{stream} {'copy' if copy else 'sum'}"
        entries.append(entry | {"features": features})
    return entries


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture.

    Without the sum: the width of the model with everything and with nothing, and the widest row. With the sum: the
    vision encoder under autocast; all in bfloat16; and everything. With the copy: the other encoders under autocast.
    """
    return [
        *_entries(arch, 768, None, ()),
        *_entries(arch, 768, None, ("x_bias_ptr", "seed_ptr", "grad_x_ptr")),
        *_entries(arch, 4096, None, ()),
        *_entries(arch, 768, "fp32", ("x_bias_ptr", "seed_ptr")),
        *_entries(arch, 768, "bf16", ("x_bias_ptr", "seed_ptr", "grad_x_ptr")),
        *_entries(arch, 768, "fp32", ()),
        *_entries(arch, 768, "fp32", (), copy=True),
    ]
