"""``cross_attention``: query projection, attention and output projection, of which the shorter side takes in some."""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.ops.attention import attention, autocast
from sclkern.ops.attention import check as check_attention
from sclkern.ops.attention import unsupported as attention_unsupported
from sclkern.ops.dispatch import Choice, asked, choose, interpreted
from sclkern.random import seed_tensor
from sclkern.reference.cross_attention import absorb_into_keys, absorbed_attention, absorbed_probabilities, dropped
from sclkern.reference.cross_attention import cross_attention as reference

FORMS = ("auto", "never", "keys", "queries")
# A form is taken where it multiplies at most this share of what the definition does: its smaller products save less
# time than multiply-adds. On one core of a CPU a share of 0.27 takes 0.35 of the time, 0.5 takes 0.7, 0.8 takes 0.9.
WORTHWHILE = 0.8
# Of the kernel: keys that one tile holds, and padded columns of heads times keys that a program holds.
MIN_KEYS, MAX_KEYS, MAX_COLUMNS = 16, 32, 384


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
    absorb: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """A whole cross-attention sub-layer, ``reference.cross_attention``, that multiplies no more than it must.

    With few keys, (x W_q^T) K^T is cheaper as x (W_q^T K^T), and (P V) W_o^T as P (V W_o^T): the long side is never
    projected. With few queries the same holds for the key and value projections of the context. "auto" counts the
    multiply-adds of each form (``relative_costs``) and takes the cheapest where that is at most 0.8 of the definition.

    Few keys have one kernel forward and one backward, up to 16 keys of 24 heads or 32 keys of 12; the definition has
    the kernel of ``attention`` between its projections. Few queries have no kernel, but PyTorch's matrix products on
    every device: on a GPU their dropout mask costs many small launches, so that "auto" leaves them out with dropout.

    Args:
        x: (B, Lq, W) float16, bfloat16 or float32 (any floating dtype on the eager path), any strides.
        context: (B, Lk, W) in the dtype of x; Lk may be 0.
        in_weight: (3 W, W), in_bias: (3 W,): the rows of query, key and value, as ``torch.nn.MultiheadAttention``
            stacks them. out_weight: (W, W). out_bias: (W,). In the dtype of x; under autocast all six tensors are cast.
        num_heads: H, which divides W.
        key_padding_mask: (B, Lk) bool, True = attend. What the other rows of the context hold is never read, NaN too; a
            sample without a valid key gets ``out_bias``.
        dropout_p: probability of dropping a probability, rounded to a multiple of 1 / 65536; at most 65536 queries and
            524288 keys then.
        softmax_scale: default 1 / sqrt(W / H).
        seed: of the dropout mask (``reference.attention_dropout_mask``): int, or int64 tensor of one element on the
            device of x. None draws one from torch's generator. Every form and backend drops the same probabilities.
        absorb: "auto", or the form by name: "never" is the definition, "keys", "queries".
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.choose``); "triton" by name takes only forms
            that have a kernel.

    Returns:
        (B, Lq, W) in the dtype of x.

    Raises:
        TypeError: a tensor, the seed or a number has the wrong type. ValueError: wrong shape, device, range, form or
            backend, or "triton" asked for by name where it cannot run. RuntimeError: second derivatives of the kernel;
            ``backend="eager"`` has them.
    """
    tensors = x, context, in_weight, in_bias, out_weight, out_bias = [
        autocast(t) for t in (x, context, in_weight, in_bias, out_weight, out_bias)
    ]
    check(*tensors, num_heads, key_padding_mask, dropout_p, softmax_scale, seed, absorb)
    width = x.shape[-1]
    scale = 1 / math.sqrt(width // num_heads) if softmax_scale is None else float(softmax_scale)
    form, choice, _ = plan(
        *tensors, num_heads=num_heads, dropout_p=dropout_p, scale=scale, absorb=absorb, backend=backend
    )
    seed = seed_tensor(seed, x.device) if dropout_p > 0 and (seed is not None or choice.backend == "triton") else None
    options = {
        "key_padding_mask": key_padding_mask,
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "seed": seed,
    }
    if form == "never":
        if key_padding_mask is not None:
            # The projections would carry NaN of the padding into the gradients of their weights.
            context = context.masked_fill(~key_padding_mask[:, :, None], 0.0)
        query = F.linear(x, in_weight[:width], in_bias[:width])
        key, value = F.linear(context, in_weight[width:], in_bias[width:]).chunk(2, -1)
        query, key, value = (tensor.unflatten(-1, (num_heads, -1)) for tensor in (query, key, value))
        return F.linear(attention(query, key, value, backend=backend, **options).flatten(-2), out_weight, out_bias)
    if choice.backend == "eager":
        return reference(*tensors, num_heads=num_heads, absorb=form, **options)
    absorbed = absorb_into_keys(
        context, in_weight, in_bias, out_weight, num_heads=num_heads, scale=scale, mask=key_padding_mask
    )
    mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    tensors = (t.contiguous() for t in (x, *absorbed, out_bias))
    return torch.ops.sclkern.cross_attention(*tensors, mask, seed, float(dropout_p))


def relative_costs(queries: int, keys: int, width: int, num_heads: int, computed_keys: int) -> dict:
    """Multiply-adds of the forms, as shares of those of the definition.

    The definition projects queries and outputs, keys and values, and its core multiplies D channels a score, twice.
    A form projects its short side four times, and its core multiplies all W channels a score and head, twice.

    Args:
        computed_keys: of the form "keys", with those a kernel pads with.
    """
    definition = max(1, 2 * (queries + keys) * width + 2 * queries * keys)
    scores = 2 * num_heads * queries
    return {
        "never": 1.0,
        "keys": (4 * keys * width + scores * computed_keys) / definition,
        "queries": (4 * queries * width + scores * keys) / definition,
    }


def plan(
    x: Tensor,
    context: Tensor,
    *parameters: Tensor,
    num_heads: int,
    dropout_p: float = 0.0,
    scale: float = 1.0,
    absorb: str = "auto",
    backend: str = "auto",
) -> tuple[str, Choice, float]:
    """The form that ``cross_attention`` takes, its backend and its share of the definition's multiply-adds."""
    queries, keys, width = x.shape[1], context.shape[1], x.shape[2]
    problems = {
        "never": attention_unsupported(x[..., : width // num_heads], scale),
        "keys": unsupported(keys, num_heads),
        "queries": "what is absorbed into queries has no kernel",
    }
    forms = list(problems) if absorb == "auto" else [absorb]
    if absorb == "auto" and asked(backend) == "triton":
        forms = [form for form in forms if problems[form] is None] or ["never"]
    choices = {form: choose(x, context, *parameters, backend=backend, unsupported=problems[form]) for form in forms}
    if dropout_p > 0 and "never" in choices and choices["never"].backend == "triton":
        choices = {form: choice for form, choice in choices.items() if choice.backend == "triton"}
    padded = MIN_KEYS if keys <= MIN_KEYS else MAX_KEYS
    on_kernel = "keys" in choices and choices["keys"].backend == "triton"
    costs = relative_costs(queries, keys, width, num_heads, padded if on_kernel else keys)
    form, *others = choices
    # Not min(): torch.compile cannot trace its key.
    for other in others:
        form = other if costs[other] < costs[form] else form
    if "never" in choices and costs[form] > WORTHWHILE:
        form = "never"
    return form, choices[form], costs[form]


def unsupported(keys: int, num_heads: int) -> str | None:
    """Why the kernel of the form "keys" cannot take these, or None."""
    if keys > MAX_KEYS:
        return f"absorbed into more than {MAX_KEYS} keys there is no kernel"
    if num_heads * (MIN_KEYS if keys <= MIN_KEYS else MAX_KEYS) > MAX_COLUMNS:
        return f"absorbed into {keys} keys of {num_heads} heads there is no kernel"
    return None


def explain(*tensors: Tensor) -> str:
    """What ``cross_attention`` does with its six tensors under "auto", without dropout and for heads of 64 channels; of
    fewer tensors only the backend."""
    if len(tensors) < 6:
        return str(choose(*tensors))
    form, choice, share = plan(*tensors[:6], num_heads=max(1, tensors[0].shape[-1] // 64))
    if form == "never":
        return f"{choice}; nothing absorbed"
    length = tensors[form == "keys"].shape[1]
    return f"{choice}; absorbed into the {length} {form}: {share:.2f} of the plain multiply-adds"


def check(
    x: Tensor,
    context: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_heads: int,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    seed: int | Tensor | None,
    absorb: str,
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, expected a floating dtype")
    if x.ndim != 3 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, Lq, W) with W of at least 1")
    batch, _, width = x.shape
    shapes = {
        "context": (context, "(B, Lk, W)", (batch, context.shape[1] if context.ndim == 3 else -1, width)),
        "in_weight": (in_weight, "(3 W, W)", (3 * width, width)),
        "in_bias": (in_bias, "(3 W,)", (3 * width,)),
        "out_weight": (out_weight, "(W, W)", (width, width)),
        "out_bias": (out_bias, "(W,)", (width,)),
    }
    for name, (tensor, expected, shape) in shapes.items():
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected that of x, {x.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {expected} for x of shape (B, Lq, W) = "
                f"{tuple(x.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of x, {x.device}")
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads: got {type(num_heads).__name__}, expected an int")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, expected a divisor of W = {width}")
    if absorb not in FORMS:
        raise ValueError(f"absorb: got {absorb!r}, expected one of {', '.join(FORMS)}")
    query, key = (t.detach().unflatten(-1, (num_heads, -1)) for t in (x, context))
    check_attention(query, key, key, key_padding_mask, dropout_p, softmax_scale, seed)


# Optional, because torch reads these annotations and not every version it supports knows the bar.
def _forward(
    x: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    out_bias: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    seed: Optional[Tensor],  # noqa: UP045
    dropout_p: float,
) -> Tensor:
    from sclkern.kernels import cross_attention as kernels  # here, because Triton is optional

    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device_of(x):
        return kernels.cross_attention_forward(
            x, score_weight, score_bias, value_weight, out_bias, mask, seed, dropout_p
        )  # fmt: skip


def _backward(
    grad_out: Tensor,
    x: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    value_weight: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    seed: Optional[Tensor],  # noqa: UP045
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sclkern.kernels import cross_attention as kernels

    grad_out = grad_out.contiguous()
    with torch.cuda.device_of(x):
        grad_x, grad_scores, used = kernels.cross_attention_backward(
            grad_out, x, score_weight, score_bias, value_weight, mask, seed, dropout_p
        )
    return grad_x, *_over_queries(grad_out, x, grad_scores, used, score_weight.shape[2])


def _over_queries(grad_out: Tensor, x: Tensor, grad_scores: Tensor, used: Tensor, keys: int) -> tuple[Tensor, ...]:
    """Gradients of score_weight, score_bias and value_weight from (B, Lq, H, ``keys`` or more)."""
    size = grad_scores.shape[2:]
    products = (
        torch.bmm(grad_scores.flatten(2).transpose(1, 2), x).unflatten(1, size),
        grad_scores.sum(1, dtype=torch.float32).to(x.dtype),
        torch.bmm(used.flatten(2).transpose(1, 2), grad_out).unflatten(1, size),
    )
    return tuple(product[:, :, :keys].transpose(0, 1).contiguous() for product in products)


_op = torch.library.custom_op("sclkern::cross_attention", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    "sclkern::cross_attention_backward", _backward, mutates_args=(), device_types="cuda"
)


@_op.register_kernel("cpu")
def _(x, score_weight, score_bias, value_weight, out_bias, mask, seed, dropout_p):
    if interpreted():
        return _forward(x, score_weight, score_bias, value_weight, out_bias, mask, seed, dropout_p)
    tensors = x, score_weight, score_bias, value_weight, out_bias, mask
    return absorbed_attention(*tensors, dropout_p=dropout_p, seed=seed)


@_op_backward.register_kernel("cpu")
def _(grad_out, x, score_weight, score_bias, value_weight, mask, seed, dropout_p):
    if interpreted():
        return _backward(grad_out, x, score_weight, score_bias, value_weight, mask, seed, dropout_p)
    weights = absorbed_probabilities(x, score_weight, score_bias, mask)
    score_rows, value_rows = (t.transpose(0, 1).flatten(1, 2) for t in (score_weight, value_weight))
    # What dropout leaves of ones is the factor that dropout multiplies by.
    factor = dropped(torch.ones_like(weights.transpose(1, 2)), dropout_p, seed).transpose(1, 2)
    grad_weights = (grad_out @ value_rows.transpose(1, 2)).view(weights.shape) * factor
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_x = grad_scores.flatten(2) @ score_rows
    return grad_x, *_over_queries(grad_out, x, grad_scores, weights * factor, score_weight.shape[2])


@_op.register_fake
def _(x, score_weight, score_bias, value_weight, out_bias, mask, seed, dropout_p):
    return x.new_empty(x.shape)


@_op_backward.register_fake
def _(grad_out, x, score_weight, score_bias, value_weight, mask, seed, dropout_p):
    return tuple(t.new_empty(t.shape) for t in (x, score_weight, score_bias, value_weight))


def _setup(ctx, inputs, output) -> None:
    x, score_weight, score_bias, value_weight, _, mask, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(x, score_weight, score_bias, value_weight, mask, seed)


def _gradient(ctx, grad_out: Tensor):
    gradients = torch.ops.sclkern.cross_attention_backward(grad_out, *ctx.saved_tensors, ctx.dropout_p)
    grad_out_bias = grad_out.sum((0, 1)) if ctx.needs_input_grad[4] else None
    return (*gradients, grad_out_bias, None, None, None)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('cross_attention: the kernel has no second derivative; backend="eager" has')


_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
