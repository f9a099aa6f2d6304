"""bfloat16 in Triton's interpreter as a GPU computes it: each operation in float32, its result rounded to nearest even.

The interpreter keeps bfloat16 as its bits in uint16. It adds, compares and multiplies those as integers, and truncates
where it casts. For one addition, product, quotient or root of bfloat16, float32 has bits enough that rounding twice
is rounding once; a multiply-add is rounded to odd first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

from sanitizer import replace
from sclkern.ops import dispatch

NAN = np.uint16(0x7FFF)


def decode(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 (uint16) as float32."""
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """Bits of bfloat16 (uint16) nearest to ``values``, half-way cases to even; or the next ones ``toward_zero``."""
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = wide if toward_zero else wide + np.uint32(0x7FFF) + (wide >> np.uint32(16) & np.uint32(1))
    bits = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), NAN, bits).reshape(np.shape(values))


def round_to_odd(nearest: np.ndarray, too_large: np.ndarray, inexact: np.ndarray) -> np.ndarray:
    """What was rounded to ``nearest``, cut off toward zero, with the last bit set where that lost something.

    Such a number can be rounded once more without being rounded twice.
    """
    kind = f"u{nearest.dtype.itemsize}"
    bits = np.where(too_large, np.nextafter(nearest, nearest.dtype.type(0)), nearest).view(kind)
    return (bits | inexact.astype(kind)).view(nearest.dtype)


def multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of bits, rounded once."""
    x, y, z = (np.float64(decode(bits)) for bits in (x, y, z))
    product = x * y  # exact
    total = product + z
    part = total - product
    lost = (product - (total - part)) + (z - part)
    exact = ~np.isfinite(total) | (lost == 0)
    total = round_to_odd(total, ~exact & (np.signbit(lost) != np.signbit(total)), ~exact)
    narrow = total.astype(np.float32)
    exact = ~np.isfinite(total) | (narrow == total)
    return encode(round_to_odd(narrow, ~exact & (np.abs(narrow) > np.abs(total)), ~exact))


def is_bfloat16(handle: Any) -> bool:
    """Whether a tensor of the interpreter holds bits of bfloat16."""
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def _compute(op: Callable[..., np.ndarray], *handles: Any) -> Any:
    """The result of an operation in float32, rounded; or a comparison."""
    with np.errstate(all="ignore"):
        values = op(*(decode(handle.data) for handle in handles))
    if values.dtype == bool:
        return TensorHandle(values, tl.int1)
    return TensorHandle(encode(values), tl.bfloat16)


def _binary_op(original, self, lhs, rhs, op):
    if is_bfloat16(lhs) and is_bfloat16(rhs):
        return _compute(op, lhs, rhs)
    return original(self, lhs, rhs, op)


def _unary_op(original, self, arg, op):
    return _compute(op, arg) if is_bfloat16(arg) else original(self, arg, op)


def _ternary_op(original, self, lhs, rhs, other, op):
    # A selection moves bits.
    if op is not np.where and is_bfloat16(other):
        return _compute(op, lhs, rhs, other)
    return original(self, lhs, rhs, other, op)


def _create_fma(original, self, x, y, z):
    if is_bfloat16(z):
        return TensorHandle(multiply_add(x.data, y.data, z.data), tl.bfloat16)
    return original(self, x, y, z)


def _create_dot(original, self, a, b, d, *options):
    """Products of bfloat16 are exact in float32, in which a GPU adds them."""
    a, b = (TensorHandle(decode(x.data), tl.float32) if is_bfloat16(x) else x for x in (a, b))
    return original(self, a, b, d, *options)


def _cast_impl(original, self, src, dst_type):
    if is_bfloat16(src):
        if dst_type.scalar == tl.bfloat16:
            return src
        src = TensorHandle(decode(src.data), tl.float32)
    if dst_type.scalar == tl.bfloat16:
        # Integers too become float32 first.
        return TensorHandle(encode(np.asarray(src.data).astype(np.float32)), tl.bfloat16)
    return original(self, src, dst_type)


def _create_fp_to_fp(original, self, src, dst_type, rounding_mode):
    if min(src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth) > 8:
        if "RTZ" in str(rounding_mode) and dst_type.scalar == tl.bfloat16:
            return TensorHandle(encode(src.data, toward_zero=True), tl.bfloat16)
        if is_bfloat16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
    return original(self, src, dst_type, rounding_mode)


def _get_bf16(self, value):
    return TensorHandle(encode(np.array([value], np.float32)), tl.bfloat16)


def _sum(original, self, input):
    """Halves are added to halves, as by the threads of a GPU."""
    if not is_bfloat16(input.handle):
        return original(self, input)
    bits = input.handle.data
    bits = bits.reshape(-1) if self.axis is None else np.moveaxis(bits, self.axis, 0)
    while len(bits) > 1:
        half = len(bits) // 2
        bits = encode(decode(bits[:half]) + decode(bits[half:]))
    if self.keep_dims:
        shape = [1] * input.handle.data.ndim if self.axis is None else None
        return self.to_tensor(bits.reshape(shape) if shape else np.moveaxis(bits, 0, self.axis), input.dtype)
    return self.to_tensor(bits[0], input.dtype)


def _reduce(original, self, input):
    """By the function that combines two elements, except for a sum."""
    bfloat16 = any(is_bfloat16(tensor.handle) for tensor in input)
    if bfloat16 and self.combine_fn is not tl.standard._sum_combine:
        return self.generic_reduce(input)
    return original(self, input)


def _cumulate(original, self, input):
    return self.generic_scan((input,)) if is_bfloat16(input.handle) else original(self, input)


PATCHES = {
    (InterpreterBuilder, "binary_op"): _binary_op,
    (InterpreterBuilder, "unary_op"): _unary_op,
    (InterpreterBuilder, "ternary_op"): _ternary_op,
    (InterpreterBuilder, "create_fma"): _create_fma,
    (InterpreterBuilder, "create_dot"): _create_dot,
    (InterpreterBuilder, "cast_impl"): _cast_impl,
    (InterpreterBuilder, "create_fp_to_fp"): _create_fp_to_fp,
    (ReduceOps, "sum"): _sum,
    (ReduceOps, "apply_impl"): _reduce,
    (ScanOps, "cumsum"): _cumulate,
    (ScanOps, "cumprod"): _cumulate,
}


def install() -> None:
    """Let the interpreter compute bfloat16, and the ops run their kernels on it."""
    if torch.bfloat16 in dispatch.INTERPRETED_DTYPES:
        return
    dispatch.INTERPRETED_DTYPES.add(torch.bfloat16)
    for (owner, name), replacement in PATCHES.items():
        replace(owner, name, replacement)
    # Triton 3.9 has it.
    InterpreterBuilder.get_bf16 = _get_bf16
