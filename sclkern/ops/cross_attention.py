"""``cross_attention``: a whole sub-layer, with projections folded into the shorter of the two sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import reference
from sclkern.cpu import cross_attention as cpu_cross_attention
from sclkern.cpu import dropout as cpu_dropout
from sclkern.kernels.cross_attention_keys import absorb_into_keys
from sclkern.ops import _attention, _checks
from sclkern.ops._registration import choose, kernels, public_op, register
from sclkern.ops.attention import attention
from sclkern.ops.attention import plan as plan_attention
from sclkern.ops.dispatch import Choice, autocast_all, autocast_like, resolve_backend, select_backend
from sclkern.random import seed_tensor
from sclkern.reference.cross_attention import absorbed_into_queries, cheapest_form, relative_costs

FORMS = ("auto", "never", "keys", "queries")
# Of the kernel: keys that one tile holds, and padded columns of heads times keys that a program holds.
MIN_KEYS, MAX_KEYS, MAX_COLUMNS = 16, 32, 384
# Keys of a row of scores, which a program of the form "queries" holds whole.
MAX_ROW = 4096


class CrossAttentionPlan(NamedTuple):
    """What ``cross_attention`` computes.

    Attributes:
        form: "never" is the definition; "keys" and "queries" fold projections into that side.
        choice: the path, with the reasons for it and for the form.
        cost_ratio: multiply-adds, as a share of those of the definition.
    """

    form: str
    choice: Choice
    cost_ratio: float


@public_op
def cross_attention(
    x: Tensor,
    context: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    num_heads: int,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
    dropout_ids: Tensor | None = None,
    absorb: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """A whole cross-attention sub-layer, ``reference.cross_attention``, that multiplies no more than it must.

    With few keys, (x W_q^T) K^T is cheaper as x (W_q^T K^T), and (P V) W_o^T as P (V W_o^T): the long side is never
    projected. With few queries the same holds for the key and value projections of the context. "auto" counts the
    multiply-adds of each form (``relative_costs``) and takes the cheapest where that is at most 0.8 of the definition.

    Few keys have one kernel forward and one backward, up to 16 keys of 24 heads or 32 keys of 12; few queries, of up to
    4,096 keys, a kernel each for softmax and dropout between PyTorch's matrix products. The definition has the kernel
    of ``attention`` between its projections.

    Args:
        x: (B, Lq, W) float16, bfloat16 or float32 (any floating dtype on the eager path), any strides. Under autocast
            all six tensors are cast.
        context: (B, Lk, W) in the dtype of x; Lk may be 0.
        in_weight: (3 W, W), the rows of query, key and value, as ``torch.nn.MultiheadAttention`` stacks them.
        in_bias: (3 W,).
        out_weight: (W, W).
        out_bias: (W,).
        num_heads: H, which divides W.
        key_padding_mask: (B, Lk) bool, True = attend. Padded rows of the context are never read, not even NaN; a sample
            without a valid key gets ``out_bias``.
        dropout_p: dropout probability, rounded to a multiple of 1 / 65536. With dropout at most 65536 queries and
            524288 keys are supported.
        softmax_scale: factor of the scores, default 1 / sqrt(W / H).
        seed: of the dropout mask (``reference.attention_dropout_mask``): int, or int64 tensor of one element on the
            device of x. None draws one from torch's generator. Every form and backend drops the same probabilities.
        dropout_ids: (B,) int64, of the samples, as in ``attention``.
        absorb: "auto", or the form by name: "never" is the definition, "keys", "queries".
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``); "triton" by name uses only
            forms that have a kernel.

    Returns:
        (B, Lq, W) in the dtype of x.

    Raises:
        TypeError: a tensor, the seed or a number has the wrong type.
        ValueError: wrong shape, device, range, form or backend, or ``backend="triton"`` where no kernel can run.
        RuntimeError: second derivatives of the kernel; ``backend="eager"`` has them.
    """
    tensors = x, context, in_weight, in_bias, out_weight, out_bias
    numbers = dropout_p, softmax_scale, seed, dropout_ids, absorb, backend
    path = choose("cross_attention", check, plan, *tensors, num_heads, key_padding_mask, *numbers)
    cast = autocast_all(*tensors)
    x, context, in_weight, in_bias, out_weight, out_bias = cast
    options: dict[str, Any] = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "seed": seed}
    if dropout_p > 0 and (seed is not None or path.startswith("triton")):
        options["seed"] = seed_tensor(seed, x.device)
    options["dropout_ids"] = dropout_ids
    if path in ("absorbed-keys", "absorbed-queries"):
        form = path.removeprefix("absorbed-")
        options |= {"num_heads": num_heads, "key_padding_mask": key_padding_mask, "absorb": form}
        fast = dropout_p > 0 and x.device.type == "cpu" and resolve_backend(backend) == "auto"
        module = cpu_cross_attention if fast and not cpu_dropout.problems(dropout_p, *cast) else reference
        return module.cross_attention(*cast, **options)
    width = x.shape[-1]
    if key_padding_mask is not None and path != "triton-absorbed-keys":
        # The projections would carry NaN of the padding into the gradients of their weights.
        context = context.masked_fill(~key_padding_mask[:, :, None], 0.0)
    if path.startswith("triton-absorbed"):
        scale = _attention.resolve_scale(width // num_heads, softmax_scale)
        keyed = (options["seed"], dropout_ids) if dropout_p > 0 else (None, None)
        masks = [None if t is None else t.contiguous() for t in (key_padding_mask, *keyed)]
        if path == "triton-absorbed-queries":
            softmax = lambda scores: _softmax(scores.contiguous(), *masks, float(dropout_p))  # noqa: E731
            return absorbed_into_queries(x, context, *cast[2:], num_heads=num_heads, scale=scale, softmax=softmax)
        absorbed = absorb_into_keys(tuple(t.contiguous() for t in cast[1:5]), num_heads, scale, masks[0])
        return _op(x.contiguous(), *absorbed, out_bias.contiguous(), *masks, float(dropout_p))
    query_weight, context_weight = in_weight.split((width, 2 * width))
    query_bias, context_bias = in_bias.split((width, 2 * width))
    query = F.linear(x, query_weight, query_bias)
    key, value = F.linear(context, context_weight, context_bias).chunk(2, -1)
    query, key, value = (tensor.unflatten(-1, (num_heads, -1)) for tensor in (query, key, value))
    heads: Any = attention(query, key, value, key_padding_mask=key_padding_mask, **options, backend=backend)
    return F.linear(heads.flatten(-2), out_weight, out_bias)


def plan(
    x: Tensor | None, context: Tensor | None, in_weight: Tensor | None, in_bias: Tensor | None,
    out_weight: Tensor | None, out_bias: Tensor | None, *, num_heads: int | None,
    key_padding_mask: Tensor | None = None, dropout_p: float = 0.0, softmax_scale: float | None = None,
    seed: int | Tensor | None = None, dropout_ids: Tensor | None = None, absorb: str = "auto", backend: str = "auto",
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    tensors = x, context, in_weight, in_bias, out_weight, out_bias
    if x is None or context is None or num_heads is None:
        return select_backend(*autocast_like(*tensors), backend=backend)
    numbers: dict[str, Any] = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "backend": backend}
    lengths = x.shape[1], context.shape[1], x.shape[2]
    form, choice, _ = plan_form(*lengths, num_heads, x, context, absorb=absorb, **numbers)
    if form != "never":
        return choice
    query, key = (tensor.unflatten(-1, (num_heads, -1)) for tensor in (x, context))
    core = plan_attention(query, key, key, seed=seed, dropout_ids=dropout_ids, **numbers)
    return Choice(core.path, core.reasons + tuple(r for r in choice.reasons if r not in core.reasons))


def plan_form(
    num_queries: int, num_keys: int, width: int, num_heads: int, *tensors: Tensor | None, dropout_p: float = 0.0,
    softmax_scale: float | None = None, absorb: str = "auto", backend: str = "auto",
) -> CrossAttentionPlan:  # fmt: skip
    """The form that ``cross_attention`` takes for these lengths: the cheapest that is worth it.

    Args:
        num_queries: Lq.
        num_keys: Lk.
        width: W.
        num_heads: H.
        *tensors: of the dtypes and devices of the call; their shapes are not read.
        dropout_p: dropout probability.
        softmax_scale: factor of the scores.
        absorb: "auto", or the form by name.
        backend: "auto", "triton" or "eager".

    Returns:
        The form, its path and its cost.
    """
    problems = {
        "never": _attention.kernel_problems(width // num_heads, softmax_scale),
        "keys": absorbing_problems(num_keys, num_heads),
        "queries": (f"absorbed into queries of more than {MAX_ROW} keys there is no kernel",) * (num_keys > MAX_ROW),
    }
    choices = _candidates(problems, tensors, dropout_p, absorb, backend)
    on_kernel = "keys" in choices and choices["keys"].path == "triton"
    costs = relative_costs(num_queries, num_keys, width, num_heads, _padded(num_keys) if on_kernel else num_keys)
    form = cheapest_form(choices, costs)
    path, reasons = choices[form]
    if form != "never":
        path = f"triton-absorbed-{form}" if path == "triton" else f"absorbed-{form}"
    # Numbers in a message would tie a compiled graph to these lengths.
    if not torch.compiler.is_compiling():
        length = num_keys if form == "keys" else num_queries
        reasons += (_reason(form, length, absorb, costs, choices),)
    return CrossAttentionPlan(form, Choice(path, reasons), costs[form])


def _candidates(
    problems: dict[str, tuple[str, ...]], tensors: tuple[Tensor | None, ...], dropout_p: float, absorb: str,
    backend: str,
) -> dict[str, Choice]:  # fmt: skip
    """The forms that may be used, each with its path."""
    forms = list(problems) if absorb == "auto" else [absorb]
    if absorb == "auto" and resolve_backend(backend) == "triton":
        forms = [form for form in forms if not problems[form]] or ["never"]
    given = autocast_like(*tensors)
    choices = {form: select_backend(*given, backend=backend, unsupported=problems[form]) for form in forms}
    if dropout_p > 0 and "never" in choices and choices["never"].path == "triton":
        # Without a kernel the dropout mask costs many small launches.
        choices = {form: choice for form, choice in choices.items() if choice.path == "triton"}
    return choices


def _reason(form: str, length: int, absorb: str, costs: dict[str, float], choices: dict[str, Choice]) -> str:
    if form != "never":
        return f"absorbed into the {length} {form}: {costs[form]:.2f} of the plain multiply-adds"
    if absorb == "never":
        return "nothing absorbed, as requested"
    others = [
        f"{other} would take {costs[other]:.2f} of the plain multiply-adds"
        if other in choices
        else f"{other} have no kernel for this"
        for other in ("keys", "queries")
    ]
    return f"nothing absorbed: {', '.join(others)}"


def absorbing_problems(num_keys: int, num_heads: int) -> tuple[str, ...]:
    """Why the kernel of the form "keys" cannot compute this many keys and heads."""
    if num_keys > MAX_KEYS:
        return (f"absorbed into more than {MAX_KEYS} keys there is no kernel",)
    if num_heads * _padded(num_keys) > MAX_COLUMNS:
        return (f"absorbed into {num_keys} keys of {num_heads} heads there is no kernel",)
    return ()


def _padded(num_keys: int) -> int:
    return MIN_KEYS if num_keys <= MIN_KEYS else MAX_KEYS


def check(
    x: Tensor, context: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor,
    num_heads: int, key_padding_mask: Tensor | None, dropout_p: float, softmax_scale: float | None,
    seed: int | Tensor | None, dropout_ids: Tensor | None, absorb: str,
) -> None:  # fmt: skip
    """Raise for arguments that no path takes."""
    _checks.floating(x=x)
    _checks.rank("(B, Lq, W)", (3,), x=x)
    batch, num_queries, width = x.shape
    if width == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, Lq, W) with W of at least 1")
    weights = {"in_weight": in_weight, "in_bias": in_bias, "out_weight": out_weight, "out_bias": out_bias}
    _checks.floating(context=context, **weights)
    first, *others = autocast_like(x, context, *weights.values())
    _checks.same_dtype("x", first, **dict(zip(("context", *weights), others, strict=True)))
    _checks.shape("(B, Lk, W)", (batch, None, width), context=context)
    _checks.shape("(3 W, W)", (3 * width, width), in_weight=in_weight)
    _checks.shape("(3 W,)", (3 * width,), in_bias=in_bias)
    _checks.shape("(W, W)", (width, width), out_weight=out_weight)
    _checks.shape("(W,)", (width,), out_bias=out_bias)
    _checks.same_device("x", x, context=context, **weights)
    _attention.check_padding_mask("x", x, context, key_padding_mask)
    _checks.integer("num_heads", num_heads, 1)
    if width % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, expected a divisor of W = {width}")
    _checks.choice("absorb", absorb, FORMS)
    _checks.dropout_ids("(B,)", (batch,), "x", x, dropout_ids)
    _attention.check_numbers(dropout_p, softmax_scale, seed, x.device, num_queries, context.shape[1])


def _forward(
    x: Tensor, score_weight: Tensor, score_bias: Tensor, value_weight: Tensor, out_bias: Tensor, mask: Tensor | None,
    seed: Tensor | None, dropout_ids: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    tensors = x, score_weight, score_bias, value_weight, out_bias
    return kernels.cross_attention.cross_attention_forward(*tensors, mask, seed, dropout_p, dropout_ids)


def _backward(
    grad_out: Tensor, x: Tensor, score_weight: Tensor, score_bias: Tensor, value_weight: Tensor, out_bias: Tensor,
    mask: Tensor | None, seed: Tensor | None, dropout_ids: Tensor | None, dropout_p: float, needs_out_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_out = grad_out.contiguous()
    tensors = grad_out, x, score_weight, score_bias, value_weight, mask, seed
    launch = kernels.cross_attention.cross_attention_backward
    grad_x, grad_scores, p_dropped = launch(*tensors, dropout_p, dropout_ids)
    grad_out_bias = grad_out.sum((0, 1)) if needs_out_bias else out_bias.new_empty(out_bias.shape)
    num_keys, rows = score_weight.shape[2], grad_scores.shape[2:]
    # Sums over the queries, (B, H, Lk or more, ...).
    products = (
        torch.bmm(grad_scores.flatten(2).transpose(1, 2), x).unflatten(1, rows),
        grad_scores.sum(1, dtype=torch.float32).to(x.dtype),
        torch.bmm(p_dropped.flatten(2).transpose(1, 2), grad_out).unflatten(1, rows),
    )
    grad_score_weight, grad_score_bias, grad_value_weight = (
        product[:, :, :num_keys].transpose(0, 1).contiguous() for product in products
    )
    return grad_x, grad_score_weight, grad_score_bias, grad_value_weight, grad_out_bias


def _fake(x: Tensor, **_: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(**tensors: Any) -> tuple[Tensor, ...]:
    return tuple(tensors[name].new_empty(tensors[name].shape) for name in GRADIENTS.split())


GRADIENTS = "x score_weight score_bias value_weight out_bias"
_op = register("cross_attention", _forward, _fake, _backward, _fake_backward, gradients=GRADIENTS)


def _softmax_forward(
    scores: Tensor, mask: Tensor | None, seed: Tensor | None, dropout_ids: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    launch = kernels.cross_attention_queries.cross_attention_softmax_forward
    return launch(scores, mask, seed, dropout_p, dropout_ids)


def _softmax_backward(
    grad_out: Tensor, grad_total: Tensor, scores: Tensor, mask: Tensor | None, seed: Tensor | None,
    dropout_ids: Tensor | None, dropout_p: float,
) -> list[Tensor]:  # fmt: skip
    launch = kernels.cross_attention_queries.cross_attention_softmax_backward
    return [launch(grad_out.contiguous(), grad_total.contiguous(), scores, mask, seed, dropout_p, dropout_ids)]


def _fake_softmax(scores: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return _fake(scores), scores.new_empty(scores.shape[:3])


_softmax = register(
    "cross_attention_softmax", _softmax_forward, _fake_softmax, _softmax_backward,
    lambda scores, **_: [_fake(scores)], outputs="out total", gradients="scores",
)  # fmt: skip
