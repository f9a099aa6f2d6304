"""``bias_gelu``: GELU of x + bias, fused."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sclkern import reference
from sclkern.ops.dispatch import choose, interpreted

KINDS = ("none", "tanh", "quick")


def bias_gelu(
    x: Tensor, bias: Tensor, *, approximate: Literal["none", "tanh", "quick"] = "none", backend: str = "auto"
) -> Tensor:
    """GELU of ``x + bias``; the sum is not kept for the backward but computed again.

    Args:
        x: (..., D) float16, bfloat16 or float32 (any floating dtype on the eager path), any strides.
        bias: (D,) floating, of any dtype.
        approximate: "none" is the exact GELU by erf, "tanh" its approximation (Hendrycks & Gimpel, arXiv 1606.08415),
            "quick" is x * sigmoid(1.702 x), CLIP's.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.choose``).

    Returns:
        (..., D) in the dtype of x.

    Raises:
        TypeError: x or bias is not floating. ValueError: wrong shape or device, unknown ``approximate`` or backend.
    """
    check(x, bias, approximate)
    if choose(x, bias, backend=backend).backend == "eager":
        return reference.bias_gelu(x, bias, approximate=approximate)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    return torch.ops.sclkern.bias_gelu(rows, bias.contiguous(), approximate).reshape(x.shape)


def check(x: Tensor, bias: Tensor, approximate: str) -> None:
    for name, tensor in (("x", x), ("bias", bias)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got {tensor.dtype}, expected a floating dtype")
    if x.ndim < 1 or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)}, expected (D,) for x of shape (..., D) = {tuple(x.shape)}"
        )
    if x.device != bias.device:
        raise ValueError(f"bias: got device {bias.device}, expected that of x, {x.device}")
    if approximate not in KINDS:
        raise ValueError(f"approximate: got {approximate!r}, expected one of {', '.join(KINDS)}")


def _forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    from sclkern.kernels import bias_gelu as kernels  # here, because Triton is optional

    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device_of(x):
        return kernels.bias_gelu_forward(x, bias, kernels.KINDS[approximate])


def _backward(grad_out: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    from sclkern.kernels import bias_gelu as kernels

    with torch.cuda.device_of(x):
        return kernels.bias_gelu_backward(grad_out.contiguous(), x, bias, kernels.KINDS[approximate])


_op = torch.library.custom_op("sclkern::bias_gelu", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op("sclkern::bias_gelu_backward", _backward, mutates_args=(), device_types="cuda")


@_op.register_kernel("cpu")
def _(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return _forward(x, bias, approximate) if interpreted() else reference.bias_gelu(x, bias, approximate=approximate)


@_op_backward.register_kernel("cpu")
def _(grad_out: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    if interpreted():
        return _backward(grad_out, x, bias, approximate)
    total = x + bias.to(x.dtype)
    if approximate == "quick":
        gate = torch.sigmoid(1.702 * total)
        grad_x = grad_out * (gate + 1.702 * total * gate * torch.sigmoid(-1.702 * total))
    else:
        grad_x = torch.ops.aten.gelu_backward(grad_out, total, approximate=approximate)
    return grad_x, grad_x.sum(0, dtype=torch.float32).to(bias.dtype)


@_op.register_fake
def _(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


@_op_backward.register_fake
def _(grad_out: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(bias)


def _setup(ctx, inputs, output) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _gradient(ctx, grad_out: Tensor):
    x, bias = ctx.saved_tensors
    return (*torch.ops.sclkern.bias_gelu_backward(grad_out, x, bias, ctx.approximate), None)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('bias_gelu: the kernel has no second derivative; backend="eager" has')


_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
