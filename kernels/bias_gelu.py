"""Bias and GELU in one pass, forward and backward; the sum is recomputed in the backward, never stored.

R rows, D columns. Arithmetic in float32, whatever the tensors hold.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import Features, LaunchConfig, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.launch import Prepared, static_entry

EXACT, TANH, QUICK = 0, 1, 2
KINDS = {"none": EXACT, "tanh": TANH, "quick": QUICK}


@triton.jit
def normal_tail(a):
    """The probability that a standard normal variable exceeds a >= 0, within 4.5e-8 beside the error of ``exp2``.

    2 to a polynomial, fitted to the logarithm with errors weighted by what they change in the probability. Its leading
    coefficient is negative, so that it needs no bound for large a, where the exact value is below 1e-9.
    """
    log_2 = 3.937769361073151e-05 - 2.8349129479465773e-06 * a
    log_2 = log_2 * a - 0.00018618024478200823
    log_2 = log_2 * a - 0.00013693634537048638
    log_2 = log_2 * a + 0.00706342002376914
    log_2 = log_2 * a - 0.052496179938316345
    log_2 = log_2 * a - 0.4592081904411316
    log_2 = log_2 * a - 1.1511051654815674
    return tl.exp2(log_2 * a - 1.0)


@triton.jit
def gelu_and_derivative(x, KIND: tl.constexpr, BUILTIN_ERF: tl.constexpr):
    """GELU of x and its derivative, float32."""
    if KIND == 0 and not BUILTIN_ERF:
        a = tl.abs(x)
        tail = normal_tail(a)
        # max(x, 0) - a tail: of each sign without cancellation. The bound is for infinity times 0.
        out = tl.maximum(x, 0.0) - tl.minimum(a, 1e38) * tail
        # a times the density, its constant in the exponent: log2(sqrt(2 pi)).
        below = tail - a * tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361593)
        return out, tl.where(x < 0.0, below, 1.0 - below)
    elif KIND == 0:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == 1:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh(u) = 2 sigmoid(2 u) - 1, so that (1 + tanh(u)) / 2 is a sigmoid.
        half = tl.sigmoid(2.0 * inner)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        # sigmoid(-u), not 1 - sigmoid(u): the difference cancels where the sigmoid nears 1, and slope magnifies that.
        return x * half, half + 2.0 * x * half * tl.sigmoid(-2.0 * inner) * slope
    else:
        gate = tl.sigmoid(1.702 * x)
        return x * gate, gate + 1.702 * x * gate * tl.sigmoid(-1.702 * x)


@triton.jit
def bias_gelu_forward_kernel(
    x_ptr,  # (R, D)
    bias_ptr,  # (D,)
    out_ptr,  # (R, D)
    rows,
    columns,
    x_row_stride,
    out_row_stride,
    KIND: tl.constexpr,
    BUILTIN_ERF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    out, _ = gelu_and_derivative(x + bias, KIND, BUILTIN_ERF)
    tl.store(out_ptr + row * out_row_stride + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_backward_kernel(
    grad_out_ptr,  # (R, D)
    x_ptr,  # (R, D)
    bias_ptr,  # (D,)
    grad_x_ptr,  # (R, D)
    partial_ptr,  # (row blocks, D) float32: sums of grad_x over the rows of a block
    rows,
    columns,
    grad_out_row_stride,
    x_row_stride,
    grad_x_row_stride,
    KIND: tl.constexpr,
    BUILTIN_ERF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    offset = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column = offset[None, :]
    inside = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + row * grad_out_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    _, derivative = gelu_and_derivative(x + bias, KIND, BUILTIN_ERF)
    grad_x = grad_out * derivative
    tl.store(grad_x_ptr + row * grad_x_row_stride + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    # Rows outside contribute nothing: their gradient was loaded as zero.
    tl.store(partial_ptr + block * columns + offset, tl.sum(grad_x, axis=0), mask=offset < columns)


@settled
def _prepare(
    backward: bool, config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, shape: torch.Size,
    kind: int, x_row_stride: int, grad_out_row_stride: int = 0,
) -> Prepared:  # fmt: skip
    kernel = bias_gelu_backward_kernel if backward else bias_gelu_forward_kernel
    (chosen,) = resolve(config, (kernel.fn.__name__,), Features(dtype, device))
    rows, columns = shape
    grid = ceil_div(rows, chosen["BLOCK_ROWS"]), ceil_div(columns, chosen["BLOCK_COLUMNS"])
    strides = {"x_row_stride": x_row_stride}
    if backward:
        strides |= {"grad_out_row_stride": grad_out_row_stride, "grad_x_row_stride": columns}
    else:
        strides |= {"out_row_stride": columns}
    return Prepared(kernel, grid, chosen, rows=rows, columns=columns, KIND=kind, **strides)


def bias_gelu_forward(x: Tensor, bias: Tensor, kind: int, config: LaunchConfig | None = None) -> Tensor:
    """x (R, D) with contiguous rows, bias (D,): gelu(x + bias) (R, D) in the dtype of x."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _prepare(False, config, x.dtype, x.device, x.shape, kind, x.stride(0))(x, bias, out)
    return out


def bias_gelu_backward(
    grad_out: Tensor, x: Tensor, bias: Tensor, kind: int, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (R, D) and bias (D,), in their dtypes; the bias gradient is summed in a fixed order in float32."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = _prepare(True, config, x.dtype, x.device, x.shape, kind, x.stride(0), grad_out.stride(0))
    partial = x.new_empty((launch.grid[0], x.shape[1]), dtype=torch.float32)
    launch(grad_out, x, bias, grad_x, partial)
    sums = partial.sum(0)
    return grad_x, sums if bias.dtype == torch.float32 else sums.to(bias.dtype)


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    halves = ("grad_out_ptr", "x_ptr", "out_ptr", "grad_x_ptr")
    signature = dict.fromkeys(halves, "*bf16") | dict.fromkeys(("bias_ptr", "partial_ptr"), "*fp32")
    divisible = ("columns", "grad_out_row_stride", "x_row_stride", "out_row_stride", "grad_x_row_stride")
    entries = []
    for pass_, kernel in (("forward", bias_gelu_forward_kernel), ("backward", bias_gelu_backward_kernel)):
        (config,) = select("bias_gelu", pass_, torch.bfloat16, arch)
        entries += [static_entry(kernel, config, signature, divisible=divisible, KIND=kind) for kind in KINDS.values()]
    return entries
