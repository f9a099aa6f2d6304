"""``dropout_add_layer_norm``: LayerNorm of residual + dropout(x + bias), with or without that sum, fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sclkern import reference
from sclkern.cpu import dropout as cpu_dropout
from sclkern.cpu import dropout_add as cpu_dropout_add
from sclkern.ops import _checks
from sclkern.ops._registration import choose, kernels, public_op, register
from sclkern.ops.dispatch import Choice, select_backend, takes_cpu_form
from sclkern.random import seed_tensor

# The kernel holds whole rows in registers; see sclkern.kernels.dropout_add_layer_norm.
MAX_COLUMNS = 4096


@public_op
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
    dropout_ids: Tensor | None = None,
    return_sum: bool = False,
    return_copy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of ``residual + dropout(x + x_bias)``: the end of a post-norm layer and, with
    ``return_sum``, what lies between two layers of a pre-norm stream.

    The mask is a function of (seed, row, column) alone (``sclkern.reference.feature_dropout_keep``): the same on every
    backend, in the backward and in a recomputation. Statistics and sums are float32; the backward is the same to the
    bit from run to run. The mask is not stored, nor is the sum unless it is returned: the backward computes both again.

    Args:
        x: (..., D) float16, bfloat16 or float32 (any floating dtype on the eager path), any strides. A row of more than
            4096 columns takes the eager path.
        residual: of the shape of x; its dtype may differ.
        weight: (D,) floating, of any dtype.
        bias: (D,) floating, of any dtype.
        x_bias: (D,) floating, added to x before dropout (the bias of the projection that made x).
        dropout_p: dropout probability, in [0, 1]; at 0 no random number is drawn. Rounded to a multiple of 2**-16; kept
            elements are multiplied by 1 / (1 - dropout_p).
        eps: added to the variance.
        seed: int, or int64 tensor of one element on the device of x, so that a captured CUDA graph can be replayed
            with another. None draws one from torch's generator of that device (on the eager path it is torch's own
            dropout). It must not be changed in place between forward and backward.
        dropout_ids: (...) int64 on the device of x: the dropout mask of a row depends on its id in place of its index,
            so that the row keeps it in another batch and at another place. Every id has a mask of its own, equal ids
            have equal ones; the indices of the rows, as if all leading dimensions were one, are the default.
        return_sum: return the sum too, which the backward then reads in place of x and residual.
        return_copy: return the norm a second time, in the dtype of x: what products read of a stream that is wider. Not
            with ``return_sum``, whose norm has that dtype.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        (..., D) in the wider dtype of x and residual. With ``return_sum`` a pair of (..., D): the norm in the dtype
        of x, and the sum in the wider dtype. Under autocast x is what a product wrote and the norm what the next one
        reads: rounded once from float32, as autocast itself would round it before that product. What is normalised is
        the sum as it is returned, which in half precision has been rounded. With ``return_copy`` a pair of (..., D):
        the norm in the wider dtype, and in that of x, which is the same tensor where the two are one dtype.

    Raises:
        TypeError: a tensor is not floating, or ``dropout_p``, ``eps``, ``seed``, ``return_sum`` or ``return_copy`` has
            the wrong type. ValueError: sum and copy at once, wrong shape, device, ``dropout_p``, ``eps``, ``seed`` or
            backend, or "triton" requested by name where it cannot run. RuntimeError: second derivatives of the kernel;
            ``backend="eager"`` has them.
    """
    tensors, numbers = (x, residual, weight, bias), (dropout_p, eps, seed, dropout_ids, return_sum, return_copy)
    path = choose("dropout_add_layer_norm", check, plan, *tensors, x_bias, *numbers, backend)
    if path != "triton":
        options: dict[str, Any] = {"x_bias": x_bias, "dropout_p": dropout_p, "eps": eps, "seed": seed}
        options |= {"dropout_ids": dropout_ids, "return_sum": return_sum, "return_copy": return_copy}
        form = cpu_dropout_add if path == "cpu" else reference
        return form.dropout_add_layer_norm(*tensors, **options)
    parameters = weight.contiguous(), bias.contiguous(), None if x_bias is None else x_bias.contiguous()
    seed = seed_tensor(seed, x.device) if dropout_p > 0 else None
    ids = None if seed is None or dropout_ids is None else dropout_ids.flatten().contiguous()
    pair, narrow = return_sum or return_copy, x.dtype != torch.promote_types(x.dtype, residual.dtype)
    returned = return_sum, return_copy and narrow
    out, second, *_ = _op(_rows(x), _rows(residual), *parameters, seed, ids, float(dropout_p), float(eps), *returned)
    if return_copy and not narrow:
        second = out
    if x.ndim != 2:
        out, second = out.reshape(x.shape), second.reshape(x.shape) if pair else second
    return (out, second) if pair else out


def plan(
    x: Tensor | None, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *,
    x_bias: Tensor | None = None, dropout_p: float = 0.0, backend: str = "auto", **_: Any,
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    unsupported: tuple[str, ...] = ()
    if x is not None and x.shape[-1] > MAX_COLUMNS:
        unsupported = (f"rows of {x.shape[-1]} columns, the kernel holds at most {MAX_COLUMNS} in registers",)
    tensors = x, residual, weight, bias, x_bias
    choice = select_backend(*tensors, backend=backend, unsupported=unsupported)
    if x is None or dropout_p == 0 or not takes_cpu_form(choice, backend, x):
        return choice
    problems = cpu_dropout.problems(dropout_p, *tensors)
    return Choice("eager", choice.reasons + problems) if problems else choice.via("cpu", "dropout in pieces on a CPU")


def check(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None, dropout_p: float, eps: float,
    seed: int | Tensor | None, dropout_ids: Tensor | None, return_sum: bool, return_copy: bool,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _checks.floating(x=x, residual=residual, weight=weight, bias=bias, **_checks.given(x_bias=x_bias))
    _checks.rank("(..., D)", range(1, 65), x=x)
    _checks.shape("(..., D)", x.shape, residual=residual)
    _checks.shape("(D,)", x.shape[-1:], weight=weight, bias=bias, x_bias=x_bias)
    _checks.same_device("x", x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    _checks.probability("dropout_p", dropout_p)
    _checks.number("eps", eps, 0)
    _checks.seed(seed, x.device)
    _checks.dropout_ids("(...)", x.shape[:-1], "x", x, dropout_ids)
    _checks.boolean("return_sum", return_sum)
    _checks.boolean("return_copy", return_copy)
    if return_sum and return_copy:
        raise ValueError("return_copy: got True beside return_sum, expected one of them")


def _rows(x: Tensor) -> Tensor:
    # Not a view of two dimensions as two: autograd would record it.
    return (x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])).contiguous()


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None, seed: Tensor | None,
    dropout_ids: Tensor | None, dropout_p: float, eps: float, return_sum: bool, return_copy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    launch = kernels.dropout_add_layer_norm.dropout_add_layer_norm_forward
    numbers = dropout_p, eps, return_sum, dropout_ids, return_copy
    out, second, mean, rstd = launch(x, residual, weight, bias, x_bias, seed, *numbers)
    return out, _empty_if_none(second, x), mean, rstd


def _backward(
    grad_out: Tensor | None, grad_second: Tensor | None, x: Tensor | None, residual: Tensor | None,
    total: Tensor | None, weight: Tensor, x_bias: Tensor | None, seed: Tensor | None, dropout_ids: Tensor | None,
    mean: Tensor, rstd: Tensor, dropout_p: float, x_dtype: torch.dtype, residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    copied = total is None and grad_second is not None and grad_second.shape[0] == mean.shape[0]
    grad_copy = grad_second if copied else None
    if grad_out is None and grad_copy is not None:
        grad_out, grad_copy = grad_copy, None
    if grad_out is None:
        # Only where nothing reads the norm, for which a kernel of its own would not pay.
        assert total is not None
        grad_out = torch.zeros_like(total, dtype=x_dtype)
    # What is not returned is empty, and so is its gradient.
    grad_total = None if grad_second is None or total is None else grad_second.contiguous()
    grad_copy = None if grad_copy is None else grad_copy.contiguous()
    tensors = grad_out.contiguous(), grad_total, grad_copy, x, residual, total, weight, x_bias, seed, mean, rstd
    launch = kernels.dropout_add_layer_norm.dropout_add_layer_norm_backward
    grad_x, grad_residual, sums = launch(*tensors, dropout_p, x_dtype, residual_dtype, dropout_ids)
    return _empty_if_none(grad_x, grad_residual), grad_residual, sums


def _empty_if_none(tensor: Tensor | None, like: Tensor) -> Tensor:
    # An op returns tensors. The empty sum is not returned; the empty gradient of x stands for that of residual.
    return like.new_empty((0, like.shape[1])) if tensor is None else tensor


def _fake(
    x: Tensor, residual: Tensor, return_sum: bool, return_copy: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wider = torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty(x.shape, dtype=x.dtype if return_sum else wider)
    second = x.new_empty(x.shape, dtype=wider if return_sum else x.dtype) if return_sum or return_copy else None
    statistic = x.new_empty((x.shape[0],), dtype=torch.float32)
    return out, _empty_if_none(second, x), statistic, torch.empty_like(statistic)


def _fake_backward(
    weight: Tensor, x_bias: Tensor | None, seed: Tensor | None, mean: Tensor, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = mean.shape[0], weight.shape[0]
    grad_residual = mean.new_empty(shape, dtype=residual_dtype)
    needs_own_grad_x = seed is not None or x_dtype != residual_dtype
    grad_x = mean.new_empty(shape, dtype=x_dtype) if needs_own_grad_x else None
    sums = mean.new_empty((2 if x_bias is None else 3, shape[1]))
    return _empty_if_none(grad_x, grad_residual), grad_residual, sums


def _saved(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None, seed: Tensor | None,
    dropout_ids: Tensor | None, dropout_p: float, eps: float, return_sum: bool, return_copy: bool, out: Tensor,
    second: Tensor, *_: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """The sum in place of x and residual, where the forward wrote it."""
    return (*((None, None, second) if return_sum else (x, residual, None)), x.dtype, residual.dtype)


def _finish(results: Sequence[Tensor]) -> Sequence[Tensor]:
    grad_x, grad_residual, sums = results
    # Autograd casts the rows of the sums to the dtypes of the parameters.
    return (grad_x if grad_x.shape == grad_residual.shape else grad_residual, grad_residual, *sums.unbind())


_op = register(
    "dropout_add_layer_norm", _forward, _fake, _backward, _fake_backward,
    outputs="out second mean rstd", gradients="x residual weight bias x_bias",
    derived="x residual total x_dtype residual_dtype", derive=_saved, finish=_finish,
)  # fmt: skip
