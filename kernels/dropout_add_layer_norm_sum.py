"""LayerNorm(residual + dropout(x + x_bias)) and that sum in one pass: what a pre-norm block goes on with.

R rows, D columns; all else is as in ``dropout_add_layer_norm``. The sum is written, and the residual stream keeps it
anyway: the backward reads it in place of x and residual. The norm is that of the sum as it is stored, rounded where
that is half precision, so that the backward differentiates what the forward computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.dropout_add_layer_norm import (
    ROWS_PER_PROGRAM,
    configuration,
    dropout_factor,
    dropped_sum,
    layer_norm,
    layer_norm_gradient,
)
from sclkern.random import STREAM_FEATURES
from sclkern.reference import feature_dropout_scale, feature_dropout_threshold


@triton.jit
def dropout_add_layer_norm_sum_forward_kernel(
    x_ptr,  # (R, D)
    residual_ptr,  # (R, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    x_bias_ptr,  # (D,) or None
    seed_ptr,  # int64, or None without dropout
    out_ptr,  # (R, D)
    total_ptr,  # (R, D)
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
    place = row * columns + column
    total, _ = dropped_sum(
        x_ptr, residual_ptr, x_bias_ptr, seed_ptr, row, column, rows, columns, threshold, scale,
        BLOCK_ROWS, BLOCK_COLUMNS, STREAM,
    )  # fmt: skip
    stored = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + place, stored, mask=inside)
    out, mean, rstd = layer_norm(stored.to(tl.float32), inside, weight_ptr, bias_ptr, column, columns, eps)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def dropout_add_layer_norm_sum_backward_kernel(
    grad_out_ptr,  # (R, D)
    grad_total_ptr,  # (R, D), or None where the sum has no other reader
    total_ptr,  # (R, D)
    weight_ptr,  # (D,)
    seed_ptr,  # int64, or None without dropout
    mean_ptr,  # (R,) float32
    rstd_ptr,  # (R,) float32
    grad_x_ptr,  # (R, D), or None where it equals grad_residual
    grad_residual_ptr,  # (R, D)
    partial_ptr,  # (programs, SUMS, D) float32: sums over a program's rows for weight, bias and, with 3, x_bias
    rows,
    columns,
    threshold,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    SUMS: tl.constexpr,
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
        place = row * columns + column
        total = tl.load(total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad_out = tl.load(grad_out_ptr + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        grad_total, normal = layer_norm_gradient(grad_out, total, weight, mean, rstd, inside, columns)
        if grad_total_ptr is not None:
            grad_total += tl.load(grad_total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_residual_ptr + place, grad_total.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        grad_x = grad_total
        if seed_ptr is not None:
            grad_x *= dropout_factor(seed_ptr, row, threshold, scale, BLOCK_ROWS, BLOCK_COLUMNS, STREAM)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        grad_weight += grad_out * normal
        grad_bias += grad_out
        if SUMS == 3:
            grad_x_bias += grad_x
    partial_ptr += program * SUMS * columns + offset
    tl.store(partial_ptr, tl.sum(grad_weight, axis=0), mask=offset < columns)
    tl.store(partial_ptr + columns, tl.sum(grad_bias, axis=0), mask=offset < columns)
    if SUMS == 3:
        tl.store(partial_ptr + 2 * columns, tl.sum(grad_x_bias, axis=0), mask=offset < columns)


def dropout_add_layer_norm_sum_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual (R, D) contiguous; seed int64 of one element, or None for no dropout.

    Returns:
        The norm (R, D) in the dtype of x; the sum (R, D) in the wider dtype of x and residual; mean and 1 / deviation
        of its rows (R,) float32.
    """
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    total = torch.empty((rows, columns), dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    mean = torch.empty((rows,), dtype=torch.float32, device=x.device)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    if out.numel():
        config = configuration(columns)
        dropout_add_layer_norm_sum_forward_kernel[(triton.cdiv(rows, config["BLOCK_ROWS"]),)](
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            bias_ptr=bias,
            x_bias_ptr=x_bias,
            seed_ptr=seed,
            out_ptr=out,
            total_ptr=total,
            mean_ptr=mean,
            rstd_ptr=rstd,
            rows=rows,
            columns=columns,
            threshold=feature_dropout_threshold(dropout_p),
            scale=feature_dropout_scale(dropout_p),
            eps=eps,
            STREAM=STREAM_FEATURES,
            enable_fp_fusion=True,
            **config,
        )
    return out, total, mean, rstd


def dropout_add_layer_norm_sum_backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    residual_dtype: torch.dtype,
    x_bias: bool,
    separate: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x (None unless ``separate``), in the dtype of grad_out, and of residual (R, D); and of weight, bias
    and, where there is one, x_bias as the rows of one float32 tensor (2 or 3, D)."""
    rows, columns = total.shape
    config = configuration(columns)
    programs, sums = triton.cdiv(rows, ROWS_PER_PROGRAM), 3 if x_bias else 2
    grad_residual = torch.empty((rows, columns), dtype=residual_dtype, device=total.device)
    grad_x = torch.empty((rows, columns), dtype=grad_out.dtype, device=total.device) if separate else None
    partial = torch.empty((programs, sums, columns), dtype=torch.float32, device=total.device)
    if grad_residual.numel():
        dropout_add_layer_norm_sum_backward_kernel[(programs,)](
            grad_out_ptr=grad_out,
            grad_total_ptr=grad_total,
            total_ptr=total,
            weight_ptr=weight,
            seed_ptr=seed,
            mean_ptr=mean,
            rstd_ptr=rstd,
            grad_x_ptr=grad_x,
            grad_residual_ptr=grad_residual,
            partial_ptr=partial,
            rows=rows,
            columns=columns,
            threshold=feature_dropout_threshold(dropout_p),
            scale=feature_dropout_scale(dropout_p),
            ROWS_PER_PROGRAM=ROWS_PER_PROGRAM,
            SUMS=sums,
            STREAM=STREAM_FEATURES,
            enable_fp_fusion=True,
            **config,
        )
    return grad_x, grad_residual, partial.sum(0)


def _entries(stream: str, unneeded: tuple[str, ...]) -> list[dict]:
    """Both kernels for rows of 768 in bfloat16 beside a residual ``stream`` of that type, without ``unneeded``."""
    constants = configuration(768)
    warps = constants.pop("num_warps")
    constants["STREAM"] = STREAM_FEATURES
    branch = ("x_ptr", "out_ptr", "grad_out_ptr", "grad_x_ptr")
    streams = ("residual_ptr", "total_ptr", "grad_total_ptr", "grad_residual_ptr")
    singles = ("weight_ptr", "bias_ptr", "x_bias_ptr", "mean_ptr", "rstd_ptr", "partial_ptr")
    signature = dict.fromkeys(branch, "*bf16") | dict.fromkeys(streams, f"*{stream}") | dict.fromkeys(singles, "*fp32")
    signature |= {"seed_ptr": "*i64", "scale": "fp32", "eps": "fp32"}
    rows = {"ROWS_PER_PROGRAM": ROWS_PER_PROGRAM, "SUMS": 2 if "x_bias_ptr" in unneeded else 3}
    return [
        {
            "kernel": kernel,
            "features": f"bf16+{stream}",
            "signature": signature,
            "constants": constants | more | {name: None for name in unneeded if name in kernel.arg_names},
            "num_warps": warps,
            "divisible": ("columns",),
        }
        for kernel, more in (
            (dropout_add_layer_norm_sum_forward_kernel, {}),
            (dropout_add_layer_norm_sum_backward_kernel, rows),
        )
    ]


# What the static checks compile: the vision encoder under autocast; all in bfloat16; and with everything.
AHEAD_OF_TIME = [
    *_entries("fp32", ("x_bias_ptr", "seed_ptr")),
    *_entries("bf16", ("x_bias_ptr", "seed_ptr", "grad_x_ptr")),
    *_entries("fp32", ()),
]
