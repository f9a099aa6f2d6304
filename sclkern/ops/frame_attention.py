"""``frame_attention``: attention of a video's tokens, CLS to everything and patches within their frame, fused."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import reference
from sclkern.ops.attention import attention, unsupported
from sclkern.ops.dispatch import KERNEL_DTYPES, asked, choose, interpreted


def frame_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_frames: int,
    *,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of the flexible vision encoder: a frame's CLS attends to every token of every frame, a patch only to
    the tokens of its own frame (reference: clip_model_video.py:47-63). With one frame it is ``attention``.
    As with a mask, what is not finite in one frame may reach patches of others.

    Args:
        query: (B, F * (1 + P), H, D), frame by frame, CLS first in each frame; float16, bfloat16 or float32 (any
            floating dtype on the eager path), any strides; the kernel takes D of 32, 64 and 128. Under autocast the
            three tensors are cast as torch's own attention casts them.
        key, value: of the shape and dtype of query.
        num_frames: F.
        softmax_scale: default 1 / sqrt(D). The kernel takes scales above 0.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.choose``). "eager" is the definition,
            ``reference.frame_attention``; where "auto" finds no kernel on a CPU it takes torch's own fused attention,
            once for the patches and once for the CLS.

    Returns:
        (B, F * (1 + P), H, D) in the dtype of query.

    Raises:
        TypeError: a tensor or number has the wrong type. ValueError: wrong shape, device or range, a length that is not
            a multiple of ``num_frames``, or unknown backend. RuntimeError: second derivatives of the kernel and of
            torch's fused attention; ``backend="eager"`` has them.
    """
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    check(query, key, value, num_frames, softmax_scale)
    # The definition infers the length of a frame, which an empty batch leaves open.
    if num_frames == 1 or query.shape[0] == 0:
        return attention(query, key, value, softmax_scale=softmax_scale, backend=backend)
    scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else float(softmax_scale)
    if choose(query, key, value, backend=backend, unsupported=unsupported(query, scale)).backend == "triton":
        tensors = (_contiguous_channels(tensor) for tensor in (query, key, value))
        return torch.ops.sclkern.frame_attention(*tensors, num_frames, scale)[0]
    if asked(backend) == "auto" and query.device.type == "cpu":
        return _by_torch(query, key, value, num_frames, scale)
    return reference.frame_attention(query, key, value, num_frames, softmax_scale=scale)


def check(query: Tensor, key: Tensor, value: Tensor, num_frames: int, softmax_scale: float | None) -> None:
    if not query.is_floating_point():
        raise TypeError(f"query: got {query.dtype}, expected a floating dtype")
    if query.ndim != 4 or 0 in query.shape[1:]:
        raise ValueError(
            f"query: got shape {tuple(query.shape)}, expected (B, F * (1 + P), H, D), of at least 1 each but for B"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected that of query, {query.dtype}")
        if tensor.shape != query.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected that of query, {tuple(query.shape)}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of query, {query.device}")
    if isinstance(num_frames, bool) or not isinstance(num_frames, int):
        raise TypeError(f"num_frames: got {type(num_frames).__name__}, expected an int")
    if num_frames < 1 or query.shape[1] % num_frames:
        raise ValueError(
            f"num_frames: got {num_frames} for a length of {query.shape[1]}, expected at least 1 and a divisor of it: "
            "length = num_frames * (1 + patches)"
        )
    if softmax_scale is not None and not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: got {type(softmax_scale).__name__}, expected a number")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale: got {softmax_scale}, expected a finite number")


def _autocast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    if tensor.dtype in KERNEL_DTYPES and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _contiguous_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _by_torch(query: Tensor, key: Tensor, value: Tensor, num_frames: int, softmax_scale: float) -> Tensor:
    """The same by two calls of torch's attention, without the (F * (1 + P)) ** 2 mask that one call would need."""
    batch, length, heads, head = query.shape
    tokens = length // num_frames
    framed = [tensor.reshape(batch * num_frames, tokens, heads, head) for tensor in (query, key, value)]
    # (frames or videos, heads, tokens, D), torch's order.
    patches, *frame = (tensor.transpose(1, 2) for tensor in (framed[0][:, 1:], *framed[1:]))
    cls, *video = (tensor.transpose(1, 2) for tensor in (query[:, ::tokens], key, value))
    cls = F.scaled_dot_product_attention(cls, *video, scale=softmax_scale).transpose(1, 2)
    if tokens == 1:
        return cls
    patches = F.scaled_dot_product_attention(patches, *frame, scale=softmax_scale).transpose(1, 2)
    out = torch.cat((cls.unsqueeze(2), patches.unflatten(0, (batch, num_frames))), 2)
    return out.reshape(query.shape)


# The log-sum-exp has base 2, the kernel's own.
def _forward(
    query: Tensor, key: Tensor, value: Tensor, num_frames: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from sclkern.kernels import frame_attention as kernels  # here, because Triton is optional

    # Triton launches on the current device, which may not be the tensor's.
    with torch.cuda.device_of(query):
        return kernels.frame_attention_forward(query, key, value, num_frames, softmax_scale)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    num_frames: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from sclkern.kernels import frame_attention as kernels

    grad_out = _contiguous_channels(grad_out)
    with torch.cuda.device_of(query):
        return kernels.frame_attention_backward(
            grad_out, query, key, value, out, lse, num_frames, softmax_scale
        )  # fmt: skip


_op = torch.library.custom_op("sclkern::frame_attention", _forward, mutates_args=(), device_types="cuda")
_op_backward = torch.library.custom_op(
    "sclkern::frame_attention_backward", _backward, mutates_args=(), device_types="cuda"
)  # fmt: skip


@_op.register_kernel("cpu")
def _(query, key, value, num_frames, softmax_scale):
    if interpreted():
        return _forward(query, key, value, num_frames, softmax_scale)
    out = reference.frame_attention(query, key, value, num_frames, softmax_scale=softmax_scale).contiguous()
    mask = reference.frame_attention_mask(num_frames, query.shape[1] // num_frames, query.device)
    lse = reference.attention_log_sum_exp(query, key, mask=mask, softmax_scale=softmax_scale)
    return out, lse.float() / math.log(2)


@_op_backward.register_kernel("cpu")
def _(grad_out, query, key, value, out, lse, num_frames, softmax_scale):
    if interpreted():
        return _backward(grad_out, query, key, value, out, lse, num_frames, softmax_scale)
    mask = reference.frame_attention_mask(num_frames, query.shape[1] // num_frames, query.device)
    weights = reference.attention_probabilities(query, key, mask=mask, softmax_scale=softmax_scale)
    grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad_out, value)
    delta = torch.einsum("bqhd,bqhd->bhq", grad_out, out)[..., None]
    grad_scores = weights * (grad_weights - delta) * softmax_scale
    gradients = (
        torch.einsum("bhqk,bkhd->bqhd", grad_scores, key),
        torch.einsum("bhqk,bqhd->bkhd", grad_scores, query),
        torch.einsum("bhqk,bqhd->bkhd", weights, grad_out),
    )
    return tuple(gradient.contiguous() for gradient in gradients)


@_op.register_fake
def _(query, key, value, num_frames, softmax_scale):
    batch, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, length), dtype=torch.float32)


@_op_backward.register_fake
def _(grad_out, query, key, value, out, lse, num_frames, softmax_scale):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx, inputs, output) -> None:
    query, key, value, ctx.num_frames, ctx.softmax_scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse)


def _gradient(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    gradients = torch.ops.sclkern.frame_attention_backward(
        grad_out, *ctx.saved_tensors, ctx.num_frames, ctx.softmax_scale
    )  # fmt: skip
    return (*gradients, None, None)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError('frame_attention: the kernel has no second derivative; backend="eager" has')


_op.register_autograd(_gradient, setup_context=_setup)
_op_backward.register_autograd(_no_second_derivative)
