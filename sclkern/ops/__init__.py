"""The fused ops as functions; each says what it computes and ``explain`` which backend it would take."""

from __future__ import annotations

from torch import Tensor

from sclkern.dispatch import choose
from sclkern.ops.attention import attention
from sclkern.ops.attention import unsupported as _attention_unsupported
from sclkern.ops.bias_gelu import bias_gelu
from sclkern.ops.completion_loss import completion_loss
from sclkern.ops.dropout_add_layer_norm import dropout_add_layer_norm
from sclkern.ops.dropout_add_layer_norm import unsupported as _layer_norm_unsupported

OPS = ("attention", "bias_gelu", "completion_loss", "dropout_add_layer_norm")


def explain(op: str, *tensors: Tensor) -> str:
    """The backend ``op`` would take for these tensors under "auto", with the reason: "triton: ..." or "eager: ...".

    Raises:
        ValueError: unknown op, or no tensor.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    if not tensors:
        raise ValueError("tensors: got none, expected the inputs of the op")
    unsupported = None
    if op == "attention":
        unsupported = _attention_unsupported(tensors[0], 1.0)
    elif op == "dropout_add_layer_norm":
        unsupported = _layer_norm_unsupported(tensors[0])
    return str(choose(*tensors, unsupported=unsupported))


__all__ = ["OPS", "attention", "bias_gelu", "completion_loss", "dropout_add_layer_norm", "explain"]
