# ruff: noqa: N803, constants of a kernel are written in capitals
"""Kernels of one signature that the static checks must accept or refuse."""

import triton
import triton.language as tl


@triton.jit
def rows_in_64_bits(x_ptr, out_ptr, index_ptr, rows, columns, stride, heads, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1) % heads
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        index = tl.load(index_ptr + column, mask=column < columns, other=0).to(tl.int64)
        x = tl.load(x_ptr + row[:, None] * stride + index[None, :] * stride + head * BLOCK, mask=inside, other=0.0)
        tl.store(out_ptr + row[:, None] * (heads * 64) + column[None, :], x, mask=inside)


@triton.jit
def rows_in_32_bits(x_ptr, out_ptr, index_ptr, rows, columns, stride, heads, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    x = tl.load(x_ptr + row * stride, mask=inside, other=0.0)
    tl.store(out_ptr + row, x, mask=inside)


@triton.jit
def width_in_32_bits(x_ptr, out_ptr, index_ptr, rows, columns, stride, heads, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * 768 + column, mask=column < columns, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * 768 + column, x, mask=column < columns)


@triton.jit
def widened_too_late(x_ptr, out_ptr, index_ptr, rows, columns, stride, heads, BLOCK: tl.constexpr):
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + (column * stride).to(tl.int64), mask=column < columns, other=0.0)
        tl.store(out_ptr + column, x, mask=column < columns)


@triton.jit
def index_in_32_bits(x_ptr, out_ptr, index_ptr, rows, columns, stride, heads, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + column, mask=column < columns, other=0)
    pointer = x_ptr + column
    for _ in range(0, columns, BLOCK):
        tl.store(out_ptr + index * stride, tl.load(pointer, mask=column < columns, other=0.0), mask=column < columns)
        pointer += stride


@triton.jit
def tiny_product(x_ptr, out_ptr, index_ptr, rows, columns, stride, heads, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = place < columns
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    y = tl.load(x_ptr + place + BLOCK * BLOCK, mask=inside, other=0.0)
    tl.store(out_ptr + place, tl.dot(x, y, input_precision="ieee").to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def too_much_at_once(x_ptr, out_ptr, index_ptr, rows, columns, stride, heads, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < columns, other=0.0).to(tl.float32)
    total = tl.sum(x * x)
    tl.store(out_ptr + place, (x * total).to(out_ptr.dtype.element_ty), mask=place < columns)
