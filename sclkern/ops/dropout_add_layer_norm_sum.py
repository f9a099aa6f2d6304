"""The op behind ``dropout_add_layer_norm`` with ``return_sum``, and what both forms share."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.ops.dispatch import interpreted


def separate(x_dtype: torch.dtype, residual_dtype: torch.dtype, seed: Tensor | None) -> bool:
    """Whether the gradient of x is not that of residual, which is then written once for both."""
    return seed is not None or x_dtype != residual_dtype


def or_nothing(grad_x: Tensor | None, x: Tensor) -> Tensor:
    # An op returns tensors: one without rows stands for "the gradient of residual".
    return x.new_empty((0, x.shape[1])) if grad_x is None else grad_x


def eager_sum(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor | None]:
    """The sum in float32 and the factor of dropout, None without."""
    x = x.float() if x_bias is None else x.float() + x_bias.float()
    if seed is None:
        return residual.float() + x, None
    keep = reference.feature_dropout_keep(*x.shape, dropout_p, seed)
    scale = reference.feature_dropout_scale(dropout_p)
    return residual.float() + torch.where(keep, x * scale, 0.0), keep * scale


def _forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sclkern.kernels import dropout_add_layer_norm_sum as kernels  # here, because Triton is optional

    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device_of(x):
        return kernels.dropout_add_layer_norm_sum_forward(x, residual, weight, bias, x_bias, seed, dropout_p, eps)


def _backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    from sclkern.kernels import dropout_add_layer_norm_sum as kernels

    gradients = grad_out.contiguous(), None if grad_total is None else grad_total.contiguous()
    apart = separate(grad_out.dtype, residual_dtype, seed)
    with torch.cuda.device_of(total):
        grad_x, grad_residual, grad_parameters = kernels.dropout_add_layer_norm_sum_backward(
            *gradients, total, weight, seed, mean, rstd, dropout_p, residual_dtype, x_bias, apart
        )
    return or_nothing(grad_x, grad_out), grad_residual, grad_parameters


_op = torch.library.custom_op("sclkern::dropout_add_layer_norm_sum", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    "sclkern::dropout_add_layer_norm_sum_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _(x, residual, weight, bias, x_bias, seed, dropout_p, eps):
    if interpreted():
        return _forward(x, residual, weight, bias, x_bias, seed, dropout_p, eps)
    total = eager_sum(x, residual, x_bias, seed, dropout_p)[0].to(torch.promote_types(x.dtype, residual.dtype))
    variance, mean = torch.var_mean(total.float(), 1, correction=0)
    rstd = torch.rsqrt(variance + eps)
    out = (total.float() - mean[:, None]) * rstd[:, None] * weight.float() + bias.float()
    return out.to(x.dtype), total, mean, rstd


@_op_backward.register_kernel("cpu")
def _(grad_out, grad_total, total, weight, seed, mean, rstd, dropout_p, residual_dtype, x_bias):
    if interpreted():
        return _backward(grad_out, grad_total, total, weight, seed, mean, rstd, dropout_p, residual_dtype, x_bias)
    normal = (total.float() - mean[:, None]) * rstd[:, None]
    grad_normal = grad_out.float() * weight.float()
    along = (grad_normal * normal).mean(1, keepdim=True)
    gradient = (grad_normal - grad_normal.mean(1, keepdim=True) - normal * along) * rstd[:, None]
    if grad_total is not None:
        gradient = gradient + grad_total.float()
    grad_x = gradient
    if seed is not None:
        keep = reference.feature_dropout_keep(*total.shape, dropout_p, seed)
        grad_x = gradient * keep * reference.feature_dropout_scale(dropout_p)
    sums = [(grad_out.float() * normal).sum(0), grad_out.float().sum(0)] + ([grad_x.sum(0)] if x_bias else [])
    apart = separate(grad_out.dtype, residual_dtype, seed)
    grad_x = or_nothing(grad_x.to(grad_out.dtype) if apart else None, grad_out)
    return grad_x, gradient.to(residual_dtype), torch.stack(sums)


@_op.register_fake
def _(x, residual, weight, bias, x_bias, seed, dropout_p, eps):
    statistic = x.new_empty((x.shape[0],), dtype=torch.float32)
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape), total, statistic, torch.empty_like(statistic)


@_op_backward.register_fake
def _(grad_out, grad_total, total, weight, seed, mean, rstd, dropout_p, residual_dtype, x_bias):
    grad_x = grad_out.new_empty(grad_out.shape) if separate(grad_out.dtype, residual_dtype, seed) else None
    grad_parameters = total.new_empty((3 if x_bias else 2, total.shape[1]), dtype=torch.float32)
    return or_nothing(grad_x, grad_out), total.new_empty(total.shape, dtype=residual_dtype), grad_parameters


def _setup(ctx, inputs, output) -> None:
    x, residual, weight, bias, x_bias, seed, ctx.dropout_p, _ = inputs
    _, total, mean, rstd = output
    ctx.dtypes = x.dtype, residual.dtype, bias.dtype, None if x_bias is None else x_bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    # Otherwise tensors of zeros are filled for the statistics, and for a sum without another reader.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, seed, mean, rstd)


def _gradient(ctx, grad_out: Tensor | None, grad_total: Tensor | None, _mean: None, _rstd: None):
    total, weight, seed, mean, rstd = ctx.saved_tensors
    x_dtype, residual_dtype, bias_dtype, x_bias_dtype = ctx.dtypes
    if grad_out is None:
        # Only where nothing reads the norm, for which a kernel of its own would not pay.
        grad_out = torch.zeros_like(total, dtype=x_dtype)
    grad_x, grad_residual, grad_parameters = torch.ops.sclkern.dropout_add_layer_norm_sum_backward(
        grad_out, grad_total, total, weight, seed, mean, rstd, ctx.dropout_p, residual_dtype, x_bias_dtype is not None
    )
    if not separate(x_dtype, residual_dtype, seed):
        grad_x = grad_residual
    grad_weight, grad_bias = grad_parameters[0].to(weight.dtype), grad_parameters[1].to(bias_dtype)
    grad_x_bias = None if x_bias_dtype is None else grad_parameters[2].to(x_bias_dtype)
    return grad_x, grad_residual, grad_weight, grad_bias, grad_x_bias, None, None, None


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('dropout_add_layer_norm: the kernel has no second derivative; backend="eager" has')


_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
