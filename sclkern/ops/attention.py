"""``attention``: scaled dot-product attention with key padding and dropout, fused."""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import reference
from sclkern.ops.dispatch import KERNEL_DTYPES, asked, choose, interpreted
from sclkern.random import seed_tensor

HEAD_DIMS = (32, 64, 128)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention; scores and probabilities are never in memory (Dao et al., arXiv 2205.14135).

    Args:
        query: (B, Lq, H, D) float16, bfloat16 or float32 (any floating dtype on the eager path), any strides; the
            kernel takes D of 32, 64 and 128. Under autocast the three tensors are cast as torch's own attention casts
            them.
        key, value: (B, Lk, H, D) in the dtype of query; Lk may be 0.
        key_padding_mask: (B, Lk) bool, True = attend. What the other keys and values hold is never read, NaN too; a
            query with no valid key gets zeros.
        dropout_p: probability of dropping a probability, rounded to a multiple of 1 / 65536; at most 65536 queries and
            524288 keys then.
        softmax_scale: default 1 / sqrt(D). The kernel takes scales above 0.
        seed: of the dropout mask (``reference.attention_dropout_mask``): int, or int64 tensor of one element on the
            device of query; every backend drops the same probabilities. None draws from torch's generator: a seed for
            the kernel, the mask itself on the eager path, where counting is slow.
        return_lse: return the log-sum-exp as well.

    Returns:
        (B, Lq, H, D) in the dtype of query; with ``return_lse`` also the natural log-sum-exp of the scores (before
        dropout), (B, H, Lq) float32 (float64 for float64), -inf without a valid key. It carries no gradient.

    Raises:
        TypeError: a tensor, the seed or a number has the wrong type. ValueError: wrong shape, device or range, or
            unknown backend. RuntimeError: second derivatives of the kernel; ``backend="eager"`` has them.
    """
    query, key, value = (autocast(tensor) for tensor in (query, key, value))
    check(query, key, value, key_padding_mask, dropout_p, softmax_scale, seed)
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else float(softmax_scale)
    if choose(query, key, value, backend=backend, unsupported=unsupported(query, scale)).backend == "triton":
        seed = seed_tensor(seed, query.device) if dropout_p > 0 else None
        mask = None if key_padding_mask is None else key_padding_mask.contiguous()
        tensors = (contiguous_channels(tensor) for tensor in (query, key, value))
        out, lse = torch.ops.sclkern.attention(*tensors, mask, seed, float(dropout_p), scale)
        # (H, B * Lq) in the kernel.
        lse = lse.detach().view(query.shape[2], *query.shape[:2]).transpose(0, 1)
        return (out, lse * math.log(2)) if return_lse else out
    if takes_torch(query, dropout_p, seed, backend):
        out = torch_attention(query, key, value, key_padding_mask, scale, dropout_p)
    else:
        options = {"key_padding_mask": key_padding_mask, "dropout_p": dropout_p, "softmax_scale": scale, "seed": seed}
        out = reference.attention(query, key, value, **options)
    return (out, _log_sum_exp(query, key, key_padding_mask, scale)) if return_lse else out


def takes_torch(query: Tensor, dropout_p: float, seed: int | Tensor | None, backend: str) -> bool:
    """Whether a CPU computes this by torch's attention: no other asked for by name, and no dropout mask of ours."""
    return asked(backend) == "auto" and query.device.type == "cpu" and (dropout_p == 0 or seed is None)


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """``reference.attention`` by torch's, which without dropout keeps no scores; one derivative."""
    if 0 in (query.shape[0], query.shape[1], key.shape[1]):
        return reference.attention(query, key, value, key_padding_mask=mask, softmax_scale=scale)
    if mask is not None:
        padding = ~mask[:, :, None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
        # Without a valid key all of them serve: their values are the zeros the query gets.
        mask = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    options = {"attn_mask": mask, "scale": scale, "dropout_p": dropout_p}
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    seed: int | Tensor | None,
) -> None:
    if not query.is_floating_point():
        raise TypeError(f"query: got {query.dtype}, expected a floating dtype")
    if query.ndim != 4 or 0 in query.shape[2:]:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected (B, Lq, H, D) with H and D of at least 1")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected that of query, {query.dtype}")
        expected = (query.shape[0], key.shape[1] if key.ndim == 4 else -1, *query.shape[2:])
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected (B, Lk, H, D), the same Lk for key and value, "
                f"for query of shape (B, Lq, H, D) = {tuple(query.shape)}"
            )
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of query, {query.device}")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask: got {key_padding_mask.dtype}, expected torch.bool, True = attend")
        if key_padding_mask.shape != key.shape[:2]:
            shape = tuple(key_padding_mask.shape)
            raise ValueError(f"key_padding_mask: got shape {shape}, expected (B, Lk) = {tuple(key.shape[:2])}")
        if key_padding_mask.device != query.device:
            raise ValueError(
                f"key_padding_mask: got device {key_padding_mask.device}, expected that of query, {query.device}"
            )
    check_numbers(dropout_p, softmax_scale, seed, query.device, query.shape[1], key.shape[1])


def check_numbers(
    dropout_p: float,
    softmax_scale: float | None,
    seed: int | Tensor | None,
    device: torch.device,
    queries: int,
    keys: int,
) -> None:
    for name, number in (("dropout_p", dropout_p), ("softmax_scale", softmax_scale)):
        if not (number is None and name == "softmax_scale") and not isinstance(number, (int, float)):
            raise TypeError(f"{name}: got {type(number).__name__}, expected a number")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: got {dropout_p}, expected 0 to 1")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale: got {softmax_scale}, expected a finite number")
    if dropout_p > 0 and (queries > 2**16 or keys > 2**19):
        raise ValueError(
            f"dropout_p: got {dropout_p} with {queries} queries and {keys} keys, expected at most 65536 and 524288 "
            "with dropout"
        )
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: got {seed.dtype} of shape {tuple(seed.shape)}, expected int64 of one element")
        if seed.device != device:
            raise ValueError(f"seed: got device {seed.device}, expected that of query, {device}")
    elif seed is not None and not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}, expected an int, an int64 tensor of one element or None")


def unsupported(query: Tensor, softmax_scale: float) -> str | None:
    """Why the kernel cannot take these, or None."""
    if query.shape[-1] not in HEAD_DIMS:
        return f"head dim {query.shape[-1]} has no kernel, {', '.join(map(str, HEAD_DIMS))} have"
    # The maximum of the scaled scores is taken as the scaled maximum.
    return None if softmax_scale > 0 else f"softmax_scale {softmax_scale} is not above 0"


def autocast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    if tensor.dtype in KERNEL_DTYPES and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def contiguous_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _log_sum_exp(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    mask = None if mask is None else mask[:, None, None, :]
    return reference.attention_log_sum_exp(query, key, mask=mask, softmax_scale=scale)


# The log-sum-exp of the op has base 2, the kernel's own: a conversion would round a score of 1000 twice more.
# Optional, because torch reads these annotations and not every version it supports knows the bar.
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    seed: Optional[Tensor],  # noqa: UP045
    dropout_p: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    from sclkern.kernels import attention as kernels  # here, because Triton is optional

    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device_of(query):
        return kernels.attention_forward(query, key, value, mask, seed, dropout_p, softmax_scale)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    seed: Optional[Tensor],  # noqa: UP045
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from sclkern.kernels import attention_backward as kernels

    grad_out = contiguous_channels(grad_out)
    with torch.cuda.device_of(query):
        return kernels.attention_backward(
            grad_out, query, key, value, mask, seed, out, lse, dropout_p, softmax_scale
        )  # fmt: skip


_op = torch.library.custom_op("sclkern::attention", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op("sclkern::attention_backward", _backward, mutates_args=(), device_types="cuda")


@_op.register_kernel("cpu")
def _(query, key, value, mask, seed, dropout_p, softmax_scale):
    if interpreted():
        return _forward(query, key, value, mask, seed, dropout_p, softmax_scale)
    options = {"key_padding_mask": mask, "dropout_p": dropout_p, "softmax_scale": softmax_scale, "seed": seed}
    out = reference.attention(query, key, value, **options).contiguous()
    lse = _log_sum_exp(query, key, mask, softmax_scale).float() / math.log(2)
    return out, lse.transpose(0, 1).reshape(query.shape[2], -1).contiguous()


@_op_backward.register_kernel("cpu")
def _(grad_out, query, key, value, mask, seed, out, lse, dropout_p, softmax_scale):
    if interpreted():
        return _backward(grad_out, query, key, value, mask, seed, out, lse, dropout_p, softmax_scale)
    if mask is not None:
        padding = ~mask[:, :, None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
        mask = mask[:, None, None, :]
    weights = reference.attention_probabilities(query, key, mask=mask, softmax_scale=softmax_scale)
    used, grad_weights = weights, torch.einsum("bqhd,bkhd->bhqk", grad_out, value)
    if seed is not None:
        keep = reference.attention_dropout_mask(*weights.shape, dropout_p=dropout_p, seed=seed, device=query.device)
        factor = keep * reference.attention_dropout_threshold(dropout_p)[1]
        used, grad_weights = used * factor.to(used.dtype), grad_weights * factor.to(used.dtype)
    delta = torch.einsum("bqhd,bqhd->bhq", grad_out, out)[..., None]
    grad_scores = weights * (grad_weights - delta) * softmax_scale
    gradients = (
        torch.einsum("bhqk,bkhd->bqhd", grad_scores, key),
        torch.einsum("bhqk,bqhd->bkhd", grad_scores, query),
        torch.einsum("bhqk,bqhd->bkhd", used, grad_out),
    )
    return tuple(gradient.contiguous() for gradient in gradients)


@_op.register_fake
def _(query, key, value, mask, seed, dropout_p, softmax_scale):
    batch, queries, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, batch * queries), dtype=torch.float32)


@_op_backward.register_fake
def _(grad_out, query, key, value, mask, seed, out, lse, dropout_p, softmax_scale):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx, inputs, output) -> None:
    query, key, value, mask, seed, ctx.dropout_p, ctx.softmax_scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, mask, seed, out, lse)


def _gradient(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    gradients = torch.ops.sclkern.attention_backward(grad_out, *ctx.saved_tensors, ctx.dropout_p, ctx.softmax_scale)
    return (*gradients, None, None, None, None)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('attention: the kernel has no second derivative; backend="eager" has')


_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
