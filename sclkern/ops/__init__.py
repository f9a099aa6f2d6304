"""The fused ops as functions; each says what it computes and ``explain`` which backend it would take."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern.ops.attention import attention
from sclkern.ops.attention import unsupported as _attention_unsupported
from sclkern.ops.bias_gelu import bias_gelu
from sclkern.ops.completion_loss import completion_loss
from sclkern.ops.cross_attention import cross_attention
from sclkern.ops.cross_attention import explain as _explain_cross_attention
from sclkern.ops.dispatch import choose
from sclkern.ops.dropout_add_layer_norm import dropout_add_layer_norm
from sclkern.ops.dropout_add_layer_norm import unsupported as _layer_norm_unsupported
from sclkern.ops.embed_patches import embed_patches
from sclkern.ops.embed_patches import unsupported as _embed_patches_unsupported
from sclkern.ops.frame_attention import frame_attention
from sclkern.ops.linear_cross_entropy import linear_cross_entropy
from sclkern.ops.masking import mask_text, select_patches, select_tokens
from sclkern.ops.packed_attention import packed_attention

OPS = (
    "attention",
    "bias_gelu",
    "completion_loss",
    "cross_attention",
    "dropout_add_layer_norm",
    "embed_patches",
    "frame_attention",
    "linear_cross_entropy",
    "mask_text",
    "packed_attention",
    "select_patches",
    "select_tokens",
)


def explain(op: str, *tensors: Tensor) -> str:
    """The backend ``op`` would take for these tensors under "auto", with the reason: "triton: ..." or "eager: ...".

    Raises:
        ValueError: unknown op, or no tensor.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    if not tensors:
        raise ValueError("tensors: got none, expected the inputs of the op")
    if op == "cross_attention":
        return _explain_cross_attention(*tensors)
    unsupported = None
    if op in ("attention", "frame_attention", "packed_attention"):
        unsupported = _attention_unsupported(tensors[0], 1.0)
    elif op == "dropout_add_layer_norm":
        unsupported = _layer_norm_unsupported(tensors[0])
    elif op == "embed_patches":
        unsupported = _embed_patches_unsupported(*tensors[:2])
    elif op in ("mask_text", "select_patches", "select_tokens"):
        # They take integers: the device alone decides.
        tensors = tuple(tensor.new_empty((0,), dtype=torch.float32) for tensor in tensors)
    return str(choose(*tensors, unsupported=unsupported))


__all__ = [
    "OPS",
    "attention",
    "bias_gelu",
    "completion_loss",
    "cross_attention",
    "dropout_add_layer_norm",
    "embed_patches",
    "explain",
    "frame_attention",
    "linear_cross_entropy",
    "mask_text",
    "packed_attention",
    "select_patches",
    "select_tokens",
]
