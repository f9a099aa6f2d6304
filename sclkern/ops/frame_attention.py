"""``frame_attention``: attention of a video's tokens, CLS to everything and patches within their frame, fused."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.kernels.attention_gradients import fake_gradients
from sclkern.ops import _attention, _checks
from sclkern.ops._registration import choose, kernels, public_op, register
from sclkern.ops.attention import attention
from sclkern.ops.attention import plan as plan_attention
from sclkern.ops.dispatch import Choice, autocast_all, select_backend


@public_op
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
    As with a mask, non-finite values of one frame may reach patches of others.

    Args:
        query: (B, F * (1 + P), H, D), frame by frame, CLS first in each frame; float16, bfloat16 or float32 (any
            floating dtype on the eager path), any strides; the kernel supports D of 32, 64 and 128. Under autocast
            query, key and value are cast as torch's own attention casts them.
        key: of the shape and dtype of query.
        value: of the shape and dtype of query.
        num_frames: F.
        softmax_scale: factor of the scores, default 1 / sqrt(D). The kernel supports scales above 0.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``). "eager" is the definition,
            ``reference.frame_attention``; where no kernel can run on a CPU, "auto" uses PyTorch's
            scaled_dot_product_attention, once for the patches and once for the CLS, as "flash" uses flash-attn 2.

    Returns:
        (B, F * (1 + P), H, D) in the dtype of query.

    Raises:
        TypeError: a tensor or number has the wrong type.
        ValueError: wrong shape, device or range, a length that is not a multiple of ``num_frames``, or unknown backend.
        RuntimeError: second derivatives of the kernel and of PyTorch's attention; ``backend="eager"`` has them.
    """
    path = choose("frame_attention", check, plan, query, key, value, num_frames, softmax_scale, backend)
    query, key, value = autocast_all(query, key, value)
    if _is_plain(query, num_frames):
        return attention(query, key, value, softmax_scale=softmax_scale, backend=backend)  # type: ignore[return-value]
    scale = _attention.resolve_scale(query.shape[-1], softmax_scale)
    if path == "triton":
        query, key, value = _attention.contiguous_channels(query, key, value)
        out: Tensor = _op(query, key, value, num_frames, scale)[0]
        return out
    if path in _attention.THEIRS:
        return _attend_twice(path, query, key, value, num_frames, scale)
    return reference.frame_attention(query, key, value, num_frames, softmax_scale=scale)


def plan(
    query: Tensor | None, key: Tensor | None, value: Tensor | None, num_frames: int | None, *,
    softmax_scale: float | None = None, backend: str = "auto",
) -> Choice:  # fmt: skip
    """The path of these arguments; see ``sclkern.ops.explain``."""
    if query is None:
        return select_backend(key, value, backend=backend)
    if num_frames is not None and _is_plain(query, num_frames):
        return plan_attention(query, key, value, softmax_scale=softmax_scale, backend=backend)
    if backend == "flash":
        return _attention.plan_flash(query, False, 0.0, softmax_scale)
    sdpa = "PyTorch's scaled_dot_product_attention on a CPU, once for patches and once for the CLS"
    heads = query.shape[-1], softmax_scale, backend, sdpa
    return _attention.plan_heads((query, key, value), *heads, head_dims=_attention.FRAME_HEAD_DIMS)


def check(query: Tensor, key: Tensor, value: Tensor, num_frames: int, softmax_scale: float | None) -> None:
    """Raise for arguments that no path takes."""
    form = "(B, F * (1 + P), H, D)"
    _attention.check_tensors(query, key, value, (form, form), same_length=True)
    _checks.integer("num_frames", num_frames, 1)
    if query.shape[1] % num_frames:
        raise ValueError(
            f"num_frames: got {num_frames} for a length of {query.shape[1]}, expected a divisor of it: length = "
            "num_frames * (1 + patches)"
        )
    if softmax_scale is not None:
        _checks.number("softmax_scale", softmax_scale)


def _is_plain(query: Tensor, num_frames: int) -> bool:
    """Whether this is ``attention``. The definition infers the length of a frame, which an empty batch leaves open."""
    return num_frames == 1 or query.shape[0] == 0


def _attend_twice(path: str, query: Tensor, key: Tensor, value: Tensor, num_frames: int, scale: float) -> Tensor:
    """Two calls of plain attention, without the (F * (1 + P)) ** 2 mask that one call would need."""
    batch, length, heads, head_dim = query.shape
    tokens = length // num_frames
    cls = _attention.THEIRS[path](query[:, ::tokens], key, value, None, scale)
    if tokens == 1:
        return cls
    framed = (tensor.reshape(batch * num_frames, tokens, heads, head_dim) for tensor in (query, key, value))
    frame_query, frame_key, frame_value = framed
    patches = _attention.THEIRS[path](frame_query[:, 1:], frame_key, frame_value, None, scale)
    out = torch.cat((cls.unsqueeze(2), patches.unflatten(0, (batch, num_frames))), 2)
    return out.reshape(query.shape)


# The log-sum-exp has base 2, the kernel's own.
def _forward(query: Tensor, key: Tensor, value: Tensor, num_frames: int, softmax_scale: float) -> tuple[Tensor, Tensor]:
    return kernels.frame_attention.frame_attention_forward(query, key, value, num_frames, softmax_scale)


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, num_frames: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = *_attention.contiguous_channels(grad_out), query, key, value, out, lse
    return kernels.frame_attention.frame_attention_backward(*tensors, num_frames, softmax_scale)


def _fake(query: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    batch, length, heads, _head_dim = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, length), dtype=torch.float32)


_op = register(
    "frame_attention", _forward, _fake, _backward, fake_gradients, outputs="out lse",
    gradients="query key value",
)  # fmt: skip
