"""``linear_cross_entropy``: the loss of a linear layer over a vocabulary, without all its logits in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import reference
from sclkern.ops.dispatch import KERNEL_DTYPES, asked, choose, interpreted, may_read

REDUCTIONS = ("mean", "sum", "none")
# Logits in memory at once. On a GPU 134 MB in bfloat16, less than the weight's own float32 gradient at V = 50265 and
# D = 768: 1335 rows in one piece, kept for the backward. On a CPU 67 MB in float32, 333 rows.
LOGITS = {"cuda": 2**26, "cpu": 2**24}
# Up to as many, a CPU takes the plain definition, which holds them three times.
PLAIN_LOGITS = 2**24
# The backward computes the logits of many rows again, some columns at a time; never fewer than this, or the sums of
# the hidden gradient would cost more than the products.
MIN_COLUMNS = 2048


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_hits: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight.T + bias`` with ``labels``, as ``F.cross_entropy(F.linear(...), labels)``.

    The gradient of a confident label is the sum over the other words and not softmax - 1, which cancels. At most 2^26
    logits are in memory at once on a GPU (or 2048 of each row, if that is more). So it is on a CPU under "auto" from
    2^24 logits on; below that, and by ``backend="eager"``, it is the plain definition, which alone supports double
    backward.

    Args:
        hidden: (..., D) float16, bfloat16 or float32 (any floating dtype on a CPU), any strides.
        weight: (V, D); bias: (V,) or None; in the dtype of hidden. Under autocast all are cast as F.linear casts them.
        labels: (...) int64, 0 to V - 1 or ``ignore_index``. Checked on a CPU, and on a GPU under ``SCLKERN_DEBUG=1``;
            unchecked, another label makes the loss NaN.
        ignore_index: label of the rows that take no part, whatever they hold.
        reduction: "mean" over the other rows, "sum", or "none".
        return_hits: return also how many of the other rows have their label as arg max (of equals, the first).
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.choose``).

    Returns:
        Scalar, or (...) with "none"; float32, or float64 for float64. 0 with zero gradient when every row is ignored.
        With ``return_hits`` also an int64 scalar, without gradient.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, device, label or value. RuntimeError: second derivatives of
            the kernel.
    """
    hidden, weight = _autocast(hidden), _autocast(weight)
    bias = None if bias is None else _autocast(bias)
    check(hidden, weight, bias, labels, ignore_index, reduction)
    choice = choose(hidden, weight, *(() if bias is None else (bias,)), backend=backend)
    many = hidden.device.type == "cpu" and labels.numel() * weight.shape[0] > PLAIN_LOGITS
    if choice.backend == "eager" and (asked(backend) == "eager" or not many):
        options = {"ignore_index": ignore_index, "reduction": reduction, "return_hits": return_hits}
        return reference.linear_cross_entropy(hidden, weight, bias, labels, **options)
    rows = hidden.reshape(labels.numel(), hidden.shape[-1])
    loss, hits = torch.ops.sclkern.linear_cross_entropy(
        rows, weight, bias, labels.reshape(-1).contiguous(), ignore_index, reduction
    )[:2]
    loss = loss.reshape(labels.shape) if reduction == "none" else loss
    return (loss, hits) if return_hits else loss


def check(hidden, weight, bias, labels, ignore_index, reduction) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: got {hidden.dtype}, expected a floating dtype")
    if hidden.ndim < 1:
        raise ValueError("hidden: got shape (), expected (..., D)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected that of hidden, {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (V, D) with V of at least 1 for hidden of shape "
            f"(..., D) = {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected (V,) = {tuple(weight.shape[:1])}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got {labels.dtype}, expected torch.int64")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}")
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of hidden, {hidden.device}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, expected an int")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    # A question about values: on a GPU it would wait for the device, and it cannot be traced.
    if may_read(labels):
        wrong = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
        if wrong.any():
            raise ValueError(
                f"labels: got {labels[wrong][0].item()}, expected 0 to {weight.shape[0] - 1} or {ignore_index}"
            )


def _autocast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    if tensor.dtype in KERNEL_DTYPES and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


# What the kernels compute, on a CPU; the same arguments, documented there.
def _statistics(logits, bias, labels, ignore_index, losses, lse, margin, hits, columns) -> None:
    logits[:, columns:] = 0.0
    logits = _with_bias(logits, bias, lse.dtype, columns)
    used = labels != ignore_index
    known = (labels >= 0) & (labels < columns)
    label = labels.clamp(0, columns - 1)[:, None]
    positive = logits.gather(1, label)[:, 0]
    hits.copy_((logits.argmax(1) == labels) & used)
    others = logits.scatter_(1, label, -torch.inf).logsumexp(1)
    for out, values in (
        (losses, F.softplus(others - positive)),
        (lse, torch.logaddexp(others, positive)),
        (margin, others - positive),
    ):
        out.copy_(values.masked_fill_(~known, torch.nan).masked_fill_(~used, 0.0))


def _reduce(losses, hits, labels, ignore_index, mean) -> tuple[Tensor, Tensor, Tensor]:
    count = (labels != ignore_index).sum().clamp_min(1).to(losses.dtype)
    return losses.sum() / (count if mean else 1), count, hits.sum()


def _logit_gradient(
    grad, count, logits, bias, labels, lse, margin, ignore_index, first_column, grad_logits, grad_bias, columns
) -> None:  # fmt: skip
    share = _with_bias(logits, bias, lse.dtype, columns).sub_(lse[:, None]).exp_()
    label = labels - first_column
    here = ((label >= 0) & (label < columns)).nonzero()[:, 0]
    share[here, label[here]] = -torch.sigmoid(margin[here])
    share *= (grad if count is None else grad / count).expand(len(share))[:, None]
    share.masked_fill_((labels == ignore_index)[:, None], 0.0)
    grad_logits[:, :columns] = share
    if grad_bias is not None:
        grad_bias.copy_(share.sum(0))


def _with_bias(logits, bias, dtype, columns) -> Tensor:
    logits = logits[:, :columns].to(dtype, copy=True)
    return logits if bias is None else logits.add_(bias[:columns])


_CPU = SimpleNamespace(statistics=_statistics, reduce=_reduce, gradient=_logit_gradient)


def _implementation(hidden: Tensor):
    if hidden.device.type == "cpu" and not (interpreted() and hidden.dtype in (torch.float16, torch.float32)):
        return _CPU
    from sclkern.kernels import linear_cross_entropy as kernels  # here, because Triton is optional

    return kernels


def _padded(columns: int) -> int:
    """Rows of logits begin at multiples of the kernels' ``ALIGNMENT``."""
    return (columns + 63) // 64 * 64


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045, operator schemas of older torch know no other spelling
    labels: Tensor,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, hits, count of the mean, lse and margin of each row (2, R), and the logits if they fit in one piece."""
    compute, (count, vocabulary) = _implementation(hidden), (hidden.shape[0], weight.shape[0])
    precise = {"dtype": torch.promote_types(hidden.dtype, torch.float32), "device": hidden.device}
    losses, saved = torch.empty(count, **precise), torch.empty((2, count), **precise)
    hits = torch.empty(count, dtype=torch.int32, device=hidden.device)
    step = max(1, LOGITS[hidden.device.type] // vocabulary)
    logits = hidden.new_empty((min(count, step), _padded(vocabulary)))
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        if bias is not None:
            # Padded, so that its loads are wide as those of the logits.
            bias = hidden.new_empty(_padded(vocabulary)).narrow(0, 0, vocabulary).copy_(bias)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            piece = logits[: part.stop - start]
            torch.mm(hidden[part], weight.T, out=piece[:, :vocabulary])
            rows = labels[part], ignore_index, losses[part], saved[0, part], saved[1, part], hits[part]
            compute.statistics(piece, bias, *rows, vocabulary)
        loss, divisor, hit_count = compute.reduce(losses, hits, labels, ignore_index, reduction == "mean")
    loss = losses if reduction == "none" else loss
    return loss, hit_count, divisor, saved, logits if count <= step else logits.new_empty((0, 0))


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    labels: Tensor,
    divisor: Tensor,
    saved: Tensor,
    logits: Tensor,
    ignore_index: int,
    reduction: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute, (count, vocabulary) = _implementation(hidden), (hidden.shape[0], weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    kept = logits.shape[0] == count
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden and kept else 0)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    grad_bias = hidden.new_empty(vocabulary if need_bias else 0)
    columns = vocabulary
    if not kept:
        # Whole columns: the weight is read once, and each part of its gradient is written once.
        columns = min(vocabulary, max(MIN_COLUMNS, LOGITS[hidden.device.type] // count // 128 * 128))
        logits = hidden.new_empty((count, _padded(columns)))
        total = torch.zeros(hidden.shape if need_hidden else 0, dtype=saved.dtype, device=hidden.device)
    grad_logits = torch.empty_like(logits)
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        # Zero times what an ignored row holds may be NaN.
        inputs = hidden.masked_fill((labels == ignore_index)[:, None], 0.0) if need_weight else hidden
        for first in range(0, vocabulary, columns):
            part = slice(first, min(first + columns, vocabulary))
            width = part.stop - first
            if not kept:
                torch.mm(hidden, weight[part].T, out=logits[:, :width])
            compute.gradient(
                grad,
                divisor if reduction == "mean" else None,
                logits,
                None if bias is None else bias[part],
                labels,
                *saved,
                ignore_index,
                first,
                grad_logits,
                grad_bias[part] if need_bias else None,
                width,
            )
            if need_weight:
                torch.mm(grad_logits[:, :width].T, inputs, out=grad_weight[part])
            if need_hidden and kept:
                torch.mm(grad_logits[:, :width], weight, out=grad_hidden)
            elif need_hidden:
                total += grad_logits[:, :width] @ weight[part]
    return grad_hidden if kept else total.to(hidden.dtype), grad_weight, grad_bias


_op = torch.library.custom_op("sclkern::linear_cross_entropy", _forward, mutates_args=(), device_types=("cuda", "cpu"))
_op_backward = torch.library.custom_op(
    "sclkern::linear_cross_entropy_backward", _backward, mutates_args=(), device_types=("cuda", "cpu")
)


@_op.register_fake
def _(hidden, weight, bias, labels, ignore_index, reduction):
    count, vocabulary = hidden.shape[0], weight.shape[0]
    new = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)).new_empty
    kept = count <= max(1, LOGITS.get(hidden.device.type, LOGITS["cuda"]) // vocabulary)
    logits = hidden.new_empty((count, _padded(vocabulary)) if kept else (0, 0))
    return new(count if reduction == "none" else ()), new((), dtype=torch.int64), new(()), new((2, count)), logits


@_op_backward.register_fake
def _(grad, hidden, weight, bias, labels, divisor, saved, logits, ignore_index, reduction, *needs):
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    return tuple(hidden.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, ctx.ignore_index, ctx.reduction = inputs
    _, hits, divisor, saved, logits = output
    ctx.mark_non_differentiable(hits, divisor, saved, logits)
    ctx.save_for_backward(hidden, weight, bias, labels, divisor, saved, logits)


def _gradient(ctx, grad, *_):
    needs = ctx.needs_input_grad[:3]
    found = torch.ops.sclkern.linear_cross_entropy_backward(
        grad, *ctx.saved_tensors, ctx.ignore_index, ctx.reduction, *needs
    )
    return (*(gradient if need else None for gradient, need in zip(found, needs, strict=True)), None, None, None)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('linear_cross_entropy: the kernel has no second derivative; backend="eager" has')


_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
