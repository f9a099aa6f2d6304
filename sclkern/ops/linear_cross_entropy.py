"""``linear_cross_entropy``: the loss of a linear layer over a vocabulary, without all its logits in memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sclkern import reference
from sclkern.kernels import linear_cross_entropy_cpu
from sclkern.ops import _checks
from sclkern.ops._registration import choose, interpretable, kernels, public_op, register
from sclkern.ops.dispatch import Choice, autocast, autocast_like, may_read, no_autocast, select_backend, takes_cpu_form

REDUCTIONS = ("mean", "sum", "none")
# Logits in memory at once. On a GPU 134 MB in bfloat16, less than the weight's own float32 gradient at V = 50265 and
# D = 768: 1335 rows in one piece, kept for the backward. On a CPU 67 MB in float32, 333 rows.
MAX_LOGITS = {"cuda": 2**26, "cpu": 2**24}
# Up to as many, a CPU takes the eager definition, which holds them three times.
MAX_EAGER_LOGITS = 2**24
# The backward computes the logits of many rows again, some columns at a time; never fewer than this, or the sums of
# the hidden gradient would cost more than the products.
MIN_COLUMNS = 2048


@public_op
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

    The gradient of a confident label is the sum over the other tokens and not softmax - 1, which cancels. At most 2^26
    logits are in memory at once on a GPU (or 2048 of each row, if that is more), and at most 2^24 on a CPU under "auto"
    where there would be more. With fewer, and with ``backend="eager"``, a CPU takes the eager definition, which alone
    supports double backward.

    Args:
        hidden: (..., D) float16, bfloat16 or float32 (any floating dtype on a CPU), any strides.
        weight: (V, D) in the dtype of hidden. Under autocast hidden, weight and bias are cast as F.linear casts them.
        bias: (V,) in the dtype of hidden, or None.
        labels: (...) int64, 0 to V - 1 or ``ignore_index``. Checked on a CPU, and on a GPU under ``SCLKERN_DEBUG=1``;
            unchecked, another label makes the loss NaN.
        ignore_index: label of the rows that take no part, whatever they hold.
        reduction: "mean" over the other rows, "sum", or "none".
        return_hits: return also how many of the other rows have their label as arg max (of equals, the first).
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        Scalar, or (...) with "none"; float32, or float64 for float64. 0 with zero gradient when every row is ignored.
        With ``return_hits`` also an int64 scalar, without gradient.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, device, label or value. RuntimeError: second derivatives of
            the kernel.
    """
    tensors, numbers = (hidden, weight, bias, labels), (ignore_index, reduction, return_hits)
    path = choose("linear_cross_entropy", check, plan, *tensors, *numbers, backend)
    hidden, weight, bias = autocast(hidden), autocast(weight), None if bias is None else autocast(bias)
    if path == "eager":
        options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "return_hits": return_hits}
        return reference.linear_cross_entropy(hidden, weight, bias, labels, **options)
    # Not a view of two dimensions as two: autograd would record it.
    rows = hidden if hidden.ndim == 2 else hidden.reshape(labels.numel(), hidden.shape[-1])
    loss, hits, *_ = _op(rows, weight, bias, labels.reshape(-1).contiguous(), ignore_index, reduction)
    loss = loss.reshape(labels.shape) if reduction == "none" else loss
    return (loss, hits) if return_hits else loss


def plan(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, *, backend: str = "auto", **_: Any
) -> Choice:
    """The path of these arguments; see ``sclkern.ops.explain``."""
    choice = select_backend(*autocast_like(hidden, weight, bias), backend=backend)
    if hidden is None or not takes_cpu_form(choice, backend, hidden):
        return choice
    if weight is not None and hidden.shape[:-1].numel() * weight.shape[0] > MAX_EAGER_LOGITS:
        return choice.via("tiled", f"above {MAX_EAGER_LOGITS} logits a CPU works in tiles")
    return choice.via("eager", f"up to {MAX_EAGER_LOGITS} logits a CPU takes the definition")


def check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, reduction: str,
    return_hits: bool,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _checks.floating(hidden=hidden, weight=weight, **_checks.given(bias=bias))
    _checks.dtype(torch.int64, labels=labels)
    _checks.rank("(..., D)", range(1, 65), hidden=hidden)
    cast = dict(zip(("hidden", "weight", "bias"), autocast_like(hidden, weight, bias), strict=False))
    _checks.same_dtype("hidden", cast["hidden"], **cast)
    _checks.shape("(V, D)", (None, hidden.shape[-1]), weight=weight)
    if not weight.shape[0]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (V, D) with V of at least 1")
    _checks.shape("(V,)", weight.shape[:1], bias=bias)
    _checks.shape("(...)", hidden.shape[:-1], labels=labels)
    _checks.same_device("hidden", hidden, weight=weight, bias=bias, labels=labels)
    _checks.integer("ignore_index", ignore_index)
    _checks.choice("reduction", reduction, REDUCTIONS)
    _checks.boolean("return_hits", return_hits)
    # A question about values: on a GPU it would wait for the device, and it cannot be traced.
    if may_read(labels):
        wrong = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
        if wrong.any():
            label, last = labels[wrong][0].item(), weight.shape[0] - 1
            raise ValueError(f"labels: got {label}, expected 0 to {last} or {ignore_index}")


def _padded(columns: int) -> int:
    """Rows of logits begin at multiples of the kernels' ``ALIGNMENT``."""
    return (columns + 63) // 64 * 64


def _rows(tensor: Tensor, first: int, count: int) -> Tensor:
    # A view takes as long as a launch.
    return tensor if count == tensor.shape[0] else tensor[first : first + count]


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, hits, count of the mean, lse and margin of each row (2, R), and the logits if they fit in one piece."""
    launchers, (count, vocabulary) = _launchers(hidden), (hidden.shape[0], weight.shape[0])
    precise = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    losses, saved = precise.new_empty(count), precise.new_empty((2, count))
    hits = torch.empty(count, dtype=torch.int32, device=hidden.device)
    step = max(1, MAX_LOGITS[hidden.device.type] // vocabulary)
    logits = hidden.new_empty((min(count, step), _padded(vocabulary)))
    with no_autocast(hidden):
        if bias is not None:
            # Padded, so that its loads are wide as those of the logits.
            bias = hidden.new_empty(_padded(vocabulary)).narrow(0, 0, vocabulary).copy_(bias)
        by_row = hidden, labels, losses, *saved.unbind(), hits
        for start in range(0, count, step):
            rows = min(step, count - start)
            piece = _rows(logits, 0, rows)
            inputs, targets, *results = (_rows(tensor, start, rows) for tensor in by_row)
            torch.mm(inputs, weight.T, out=piece.narrow(1, 0, vocabulary))
            launchers.statistics(piece, bias, targets, ignore_index, *results, vocabulary)
        loss, divisor, hit_count = launchers.reduce(losses, hits, labels, ignore_index, reduction == "mean")
    kept = logits if count <= step else logits.new_empty((0, 0))
    return losses if reduction == "none" else loss, hit_count, divisor, saved, kept


def _backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, divisor: Tensor,
    saved: Tensor, logits: Tensor, ignore_index: int, reduction: str, needs_hidden: bool, needs_weight: bool,
    needs_bias: bool,
) -> list[Tensor]:  # fmt: skip
    launchers, (count, vocabulary) = _launchers(hidden), (hidden.shape[0], weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    saved_logits = logits.shape[0] == count
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden and saved_logits else 0)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    grad_bias = hidden.new_empty(vocabulary if needs_bias else 0)
    columns = vocabulary
    if not saved_logits:
        # Whole columns: the weight is read once, and each part of its gradient is written once.
        columns = min(vocabulary, max(MIN_COLUMNS, MAX_LOGITS[hidden.device.type] // count // 128 * 128))
        logits = hidden.new_empty((count, _padded(columns)))
        total = torch.zeros(hidden.shape if needs_hidden else 0, dtype=saved.dtype, device=hidden.device)
    grad_logits = torch.empty_like(logits)
    with no_autocast(hidden):
        # Zero times what an ignored row holds may be NaN.
        inputs = hidden.masked_fill((labels == ignore_index)[:, None], 0.0) if needs_weight else hidden
        for first in range(0, vocabulary, columns):
            width = min(columns, vocabulary - first)
            part_weight, of_width = _rows(weight, first, width), grad_logits.narrow(1, 0, width)
            if not saved_logits:
                torch.mm(hidden, part_weight.T, out=logits[:, :width])
            count_of_mean = divisor if reduction == "mean" else None
            part_bias = None if bias is None else _rows(bias, first, width)
            results = grad_logits, _rows(grad_bias, first, width) if needs_bias else None
            rows = labels, *saved.unbind(), ignore_index
            launchers.gradient(grad_loss, count_of_mean, logits, part_bias, *rows, first, *results, width)
            if needs_weight:
                torch.mm(of_width.T, inputs, out=_rows(grad_weight, first, width))
            if needs_hidden and saved_logits:
                torch.mm(of_width, weight, out=grad_hidden)
            elif needs_hidden:
                total += of_width @ part_weight
    gradients = [grad_hidden if saved_logits else total.to(hidden.dtype), grad_weight]
    return gradients + ([] if bias is None else [grad_bias])


def _launchers(hidden: Tensor) -> Any:
    on_kernels = hidden.device.type != "cpu" or interpretable(hidden)
    return kernels.linear_cross_entropy if on_kernels else linear_cross_entropy_cpu


def _fake(hidden: Tensor, weight: Tensor, reduction: str, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, vocabulary = hidden.shape[0], weight.shape[0]
    new = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)).new_empty
    saved_logits = count <= max(1, MAX_LOGITS.get(hidden.device.type, MAX_LOGITS["cuda"]) // vocabulary)
    logits = hidden.new_empty((count, _padded(vocabulary)) if saved_logits else (0, 0))
    return new(count if reduction == "none" else ()), new((), dtype=torch.int64), new(()), new((2, count)), logits


def _fake_backward(**values: Any) -> list[Tensor]:
    given = [(values[n], values[f"needs_{n}"]) for n in GRADIENTS.split() if values[n] is not None]
    return [tensor.new_empty(tensor.shape if needed else 0) for tensor, needed in given]


GRADIENTS = "hidden weight bias"
_op = register(
    "linear_cross_entropy", _forward, _fake, _backward, _fake_backward,
    outputs="loss hits divisor saved logits", gradients=GRADIENTS, cpu=_forward, cpu_backward=_backward,
)  # fmt: skip
