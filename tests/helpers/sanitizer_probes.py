# ruff: noqa: N803, constants of a kernel are written in capitals
"""Kernels with a fault each that the sanitizer must find, and kernels that only look as if they had one."""

import triton
import triton.language as tl


@triton.jit
def double_it(x):
    """A device function: x twice."""
    return x + x


@triton.jit
def copy(x_ptr, out_ptr, first, count, BLOCK: tl.constexpr):
    """Elements from ``first`` on, ``count`` of them, a block a program."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    tl.store(out_ptr + place, tl.load(x_ptr + first + place, mask=inside, other=0), mask=inside)


@triton.jit
def shift_store(x_ptr, out_ptr, first, BLOCK: tl.constexpr):
    """Store behind ``first`` elements."""
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + first + place, double_it(tl.load(x_ptr + place)))


@triton.jit
def read_as_floats(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Take bytes for float32."""
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr.to(tl.pointer_type(tl.float32)) + place))


@triton.jit
def read_halves(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Write float32, and then its halves as bits, each program its own."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place))
    halves = out_ptr.to(tl.pointer_type(tl.int16))
    half = tl.program_id(0) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(halves + half, tl.load(halves + half))


@triton.jit
def read_what_another_wrote(out_ptr, BLOCK: tl.constexpr):
    """Each program reads the first block when it has written its own."""
    lane = tl.arange(0, BLOCK)
    place = tl.program_id(0) * BLOCK + lane
    tl.store(out_ptr + place, place)
    tl.store(out_ptr + place, tl.load(out_ptr + lane) + place)


@triton.jit
def write_what_another_read(x_ptr, BLOCK: tl.constexpr):
    """Each program moves the next block to its own place."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place + BLOCK))


@triton.jit
def write_what_all_read(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """All programs read the first block; the last one writes it."""
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + lane, x)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x_ptr + lane, x)


@triton.jit
def write_one_place(out_ptr):
    """All programs write the same value."""
    tl.store(out_ptr, 1.0)


@triton.jit
def write_in_pairs(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Two lanes write each address."""
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place // 2, tl.load(x_ptr + place))


@triton.jit
def write_twice(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Each program writes its block, reads it and writes it once more."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place))
    tl.store(out_ptr + place, tl.load(out_ptr + place) + 1)


@triton.jit
def count(x_ptr, out_ptr, READ: tl.constexpr):
    """Add x of the program to one place, by an atomic; ``READ``: and read it there."""
    tl.atomic_add(out_ptr, tl.load(x_ptr + tl.program_id(0)))
    if READ:
        tl.store(x_ptr + tl.program_id(0), tl.load(out_ptr))


@triton.jit
def largest(x_ptr, out_ptr):
    """The maximum, by an atomic, which is the same in every order."""
    tl.atomic_max(out_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def arithmetic(x_ptr, y_ptr, z_ptr, out_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """One operation on x and y in their dtype."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + place), tl.load(y_ptr + place), tl.load(z_ptr + place)
    if NAME == "add":
        out = x + y
    elif NAME == "subtract":
        out = x - y
    elif NAME == "multiply":
        out = x * y
    elif NAME == "divide":
        out = x / y
    elif NAME == "negate":
        out = -x
    elif NAME == "absolute":
        out = tl.abs(x)
    elif NAME == "maximum":
        out = tl.maximum(x, y)
    elif NAME == "less":
        out = x < y
    elif NAME == "select":
        out = tl.where(x == y, z, y)
    elif NAME == "constant":
        out = (x * 0.3 + 1.5) + tl.full((BLOCK,), 0.7, x.dtype)
    else:
        out = tl.fma(x, y, z)
    tl.store(out_ptr + place, out)


@triton.jit
def convert(x_ptr, out_ptr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    """x in the dtype of out."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def product(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    """A product of matrices."""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    out = tl.dot(tl.load(x_ptr + place), tl.load(y_ptr + place), input_precision="ieee")
    tl.store(out_ptr + place, out)


@triton.jit
def sums(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums and maxima of rows, and running sums of the first row."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row[:, None] * COLUMNS + column[None, :])
    tl.store(out_ptr + row, tl.sum(x, 1))
    tl.store(out_ptr + ROWS + row, tl.max(x, 1))
    tl.store(out_ptr + 2 * ROWS + column, tl.cumsum(tl.load(x_ptr + column), 0))
