"""The fused ops as functions; each says what it computes and ``explain`` which backend it would take."""

from __future__ import annotations

from torch import Tensor

from sclkern.dispatch import choose
from sclkern.ops.bias_gelu import bias_gelu

OPS = ("bias_gelu",)


def explain(op: str, *tensors: Tensor) -> str:
    """The backend ``op`` would take for these tensors under "auto", with the reason: "triton: ..." or "eager: ...".

    Raises:
        ValueError: unknown op, or no tensor.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    if not tensors:
        raise ValueError("tensors: got none, expected the inputs of the op")
    return str(choose(*tensors))


__all__ = ["OPS", "bias_gelu", "explain"]
