"""``dropout_add_layer_norm``: LayerNorm of residual + dropout(x + bias), fused."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sclkern import reference
from sclkern.ops.dispatch import choose, interpreted
from sclkern.ops.dropout_add_layer_norm_sum import eager_sum, or_nothing, separate
from sclkern.random import seed_tensor

# The kernel holds whole rows in registers; see sclkern.kernels.dropout_add_layer_norm.
MAX_COLUMNS = 4096


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of ``residual + dropout(x + x_bias)``: the end of a post-norm layer and, with
    ``return_sum``, what lies between two layers of a pre-norm stream.

    The mask is a function of (seed, row, column) alone (``sclkern.reference.feature_dropout_keep``): the same on every
    backend, in the backward and in a recomputation. Statistics and sums are float32; the backward is the same to the
    bit from run to run. The mask is not stored, nor is the sum unless it is returned: the backward computes both again.

    Args:
        x, residual: (..., D) of one shape, float16, bfloat16 or float32 each (any floating dtype on the eager path),
            any strides. A row of more than 4096 columns takes the eager path.
        weight, bias: (D,) floating, of any dtype.
        x_bias: (D,) floating, added to x before dropout (the bias of the projection that made x).
        dropout_p: probability of dropping an element, in [0, 1]; at 0 no random number is drawn. Rounded to a
            multiple of 2**-16; what is kept is multiplied by 1 / (1 - dropout_p).
        eps: added to the variance.
        seed: int, or int64 tensor of one element on the device of x, so that a captured CUDA graph can be replayed
            with another. None draws one from torch's generator of that device (on the eager path it is torch's own
            dropout). It must not be changed in place between forward and backward.
        return_sum: return the sum too, which the backward then reads in place of x and residual.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.choose``).

    Returns:
        (..., D) in the wider dtype of x and residual. With ``return_sum`` a pair of (..., D): the norm in the dtype
        of x, and the sum in the wider dtype. Under autocast x is what a product wrote and the norm what the next one
        reads: rounded once from float32, as autocast itself would round it before that product. What is normalised is
        the sum as it is returned, which in half precision has been rounded.

    Raises:
        TypeError: a tensor is not floating, or ``dropout_p``, ``eps``, ``seed`` or ``return_sum`` has the wrong type.
        ValueError: wrong shape, device, ``dropout_p``, ``eps``, ``seed`` or backend, or "triton" asked for by name
            where it cannot run.
    """
    check(x, residual, weight, bias, x_bias, dropout_p, eps, seed)
    if not isinstance(return_sum, bool):
        raise TypeError(f"return_sum: got {type(return_sum).__name__}, expected a bool")
    columns = x.shape[-1]
    tensors = [t for t in (x, residual, weight, bias, x_bias) if t is not None]
    choice = choose(*tensors, backend=backend, unsupported=unsupported(x))
    if choice.backend == "eager":
        return reference.dropout_add_layer_norm(
            x, residual, weight, bias, x_bias=x_bias, dropout_p=dropout_p, eps=eps, seed=seed, return_sum=return_sum
        )
    seed = seed_tensor(seed, x.device) if dropout_p > 0 else None
    rows = (t.reshape(x.shape[:-1].numel(), columns).contiguous() for t in (x, residual))
    op = torch.ops.sclkern.dropout_add_layer_norm_sum if return_sum else torch.ops.sclkern.dropout_add_layer_norm
    out, *others = op(
        *rows,
        weight.contiguous(),
        bias.contiguous(),
        None if x_bias is None else x_bias.contiguous(),
        seed,
        float(dropout_p),
        float(eps),
    )
    out = out.reshape(x.shape)
    return (out, others[0].reshape(x.shape)) if return_sum else out


def unsupported(x: Tensor) -> str | None:
    """Why the kernel cannot take ``x`` (..., D), or None."""
    if x.shape[-1] > MAX_COLUMNS:
        return f"rows of {x.shape[-1]} columns, the kernel holds at most {MAX_COLUMNS} in registers"
    return None


def check(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: int | Tensor | None,
) -> None:
    parameters = {"weight": weight, "bias": bias} | ({} if x_bias is None else {"x_bias": x_bias})
    tensors = {"x": x, "residual": residual} | parameters
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: got {tensor.dtype}, expected a floating dtype")
    if x.ndim < 1:
        raise ValueError("x: got shape (), expected (..., D)")
    if residual.shape != x.shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected that of x, {tuple(x.shape)}")
    for name, tensor in parameters.items():
        if tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected (D,) for x of shape (..., D) = {tuple(x.shape)}"
            )
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of x, {x.device}")
    for name, number, highest in (("dropout_p", dropout_p, 1.0), ("eps", eps, math.inf)):
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise TypeError(f"{name}: got {type(number).__name__}, expected a number")
        if not 0 <= number <= highest:
            raise ValueError(f"{name}: got {number}, expected a number from 0 to {highest}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: got {seed.dtype}, expected int64")
        if seed.numel() != 1:
            raise ValueError(f"seed: got shape {tuple(seed.shape)}, expected one element")
        if seed.device != x.device:
            raise ValueError(f"seed: got device {seed.device}, expected that of x, {x.device}")
    elif seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(f"seed: got {type(seed).__name__}, expected an int, an int64 tensor or None")


def _forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from sclkern.kernels import dropout_add_layer_norm as kernels  # here, because Triton is optional

    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device_of(x):
        return kernels.dropout_add_layer_norm_forward(x, residual, weight, bias, x_bias, seed, dropout_p, eps)


def _backward(
    grad_out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from sclkern.kernels import dropout_add_layer_norm as kernels

    tensors, apart = (grad_out.contiguous(), x, residual, weight, x_bias, seed), separate(x.dtype, residual.dtype, seed)
    with torch.cuda.device_of(x):
        grad_x, grad_residual, grad_parameters = kernels.dropout_add_layer_norm_backward(
            *tensors, mean, rstd, dropout_p, apart
        )
    return or_nothing(grad_x, x), grad_residual, grad_parameters


_op = torch.library.custom_op("sclkern::dropout_add_layer_norm", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    "sclkern::dropout_add_layer_norm_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _(x, residual, weight, bias, x_bias, seed, dropout_p, eps):
    if interpreted():
        return _forward(x, residual, weight, bias, x_bias, seed, dropout_p, eps)
    total, _ = eager_sum(x, residual, x_bias, seed, dropout_p)
    variance, mean = torch.var_mean(total, 1, correction=0)
    rstd = torch.rsqrt(variance + eps)
    out = (total - mean[:, None]) * rstd[:, None] * weight.float() + bias.float()
    return out.to(torch.promote_types(x.dtype, residual.dtype)), mean, rstd


@_op_backward.register_kernel("cpu")
def _(grad_out, x, residual, weight, x_bias, seed, mean, rstd, dropout_p):
    if interpreted():
        return _backward(grad_out, x, residual, weight, x_bias, seed, mean, rstd, dropout_p)
    total, factor = eager_sum(x, residual, x_bias, seed, dropout_p)
    normal = (total - mean[:, None]) * rstd[:, None]
    grad_out = grad_out.float()
    grad_normal = grad_out * weight.float()
    along = (grad_normal * normal).mean(1, keepdim=True)
    grad_total = (grad_normal - grad_normal.mean(1, keepdim=True) - normal * along) * rstd[:, None]
    grad_x = grad_total if factor is None else grad_total * factor
    sums = [(grad_out * normal).sum(0), grad_out.sum(0)] + ([] if x_bias is None else [grad_x.sum(0)])
    apart = separate(x.dtype, residual.dtype, seed)
    return or_nothing(grad_x.to(x.dtype) if apart else None, x), grad_total.to(residual.dtype), torch.stack(sums)


@_op.register_fake
def _(x, residual, weight, bias, x_bias, seed, dropout_p, eps):
    statistic = x.new_empty((x.shape[0],), dtype=torch.float32)
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return out, statistic, torch.empty_like(statistic)


@_op_backward.register_fake
def _(grad_out, x, residual, weight, x_bias, seed, mean, rstd, dropout_p):
    grad_x = x.new_empty(x.shape) if separate(x.dtype, residual.dtype, seed) else None
    sums = 2 if x_bias is None else 3
    grad_parameters = x.new_empty((sums, x.shape[1]), dtype=torch.float32)
    return or_nothing(grad_x, x), residual.new_empty(residual.shape), grad_parameters


def _setup(ctx, inputs, output) -> None:
    x, residual, weight, bias, x_bias, seed, ctx.dropout_p, _ = inputs
    _, mean, rstd = output
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    # Otherwise two tensors of zeros are filled for the statistics in every backward.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, residual, weight, x_bias, seed, mean, rstd)


def _gradient(ctx, grad_out: Tensor, _mean: None, _rstd: None):
    x, residual, weight, x_bias, seed, mean, rstd = ctx.saved_tensors
    grad_x, grad_residual, grad_parameters = torch.ops.sclkern.dropout_add_layer_norm_backward(
        grad_out, x, residual, weight, x_bias, seed, mean, rstd, ctx.dropout_p
    )
    if not separate(x.dtype, residual.dtype, seed):
        grad_x = grad_residual
    grad_weight, grad_bias = grad_parameters[0].to(weight.dtype), grad_parameters[1].to(ctx.bias_dtype)
    grad_x_bias = None if x_bias is None else grad_parameters[2].to(x_bias.dtype)
    return grad_x, grad_residual, grad_weight, grad_bias, grad_x_bias, None, None, None


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('dropout_add_layer_norm: the kernel has no second derivative; backend="eager" has')


_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
