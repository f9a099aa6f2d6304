"""``bias_gelu``: GELU of x + bias, fused."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from sclkern import reference
from sclkern.ops import _checks
from sclkern.ops._registration import choose, kernels, public_op, register
from sclkern.ops.dispatch import Choice, select_backend

KINDS = ("none", "tanh", "quick")


@public_op
def bias_gelu(
    x: Tensor, bias: Tensor, *, approximate: Literal["none", "tanh", "quick"] = "none", backend: str = "auto"
) -> Tensor:
    """GELU of ``x + bias``; the sum is not kept for the backward but computed again.

    Args:
        x: (..., D) float16, bfloat16 or float32 (any floating dtype on the eager path), any strides.
        bias: (D,) floating, of any dtype.
        approximate: "none" is the exact GELU by erf, "tanh" its approximation (Hendrycks & Gimpel, arXiv 1606.08415),
            "quick" is x * sigmoid(1.702 x), CLIP's.
        backend: "auto", "triton" or "eager" (see ``sclkern.ops.dispatch.select_backend``).

    Returns:
        (..., D) in the dtype of x.

    Raises:
        TypeError: x or bias is not floating. ValueError: wrong shape or device, unknown ``approximate`` or backend.
    """
    if choose("bias_gelu", check, plan, x, bias, approximate, backend) == "eager":
        return reference.bias_gelu(x, bias, approximate=approximate)
    if x.ndim == 2:
        # A view of two dimensions would be recorded by autograd.
        return _op(x.contiguous(), bias.contiguous(), approximate)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    return _op(rows, bias.contiguous(), approximate).reshape(x.shape)


def plan(x: Tensor | None, bias: Tensor | None, *, backend: str = "auto", **_: Any) -> Choice:
    """The path of these arguments; see ``sclkern.ops.explain``."""
    return select_backend(x, bias, backend=backend)


def check(x: Tensor, bias: Tensor, approximate: str) -> None:
    """Raise for arguments that no path takes."""
    _checks.floating(x=x, bias=bias)
    _checks.rank("(..., D)", range(1, 65), x=x)
    _checks.shape("(D,)", x.shape[-1:], bias=bias)
    _checks.same_device("x", x, bias=bias)
    _checks.choice("approximate", approximate, KINDS)


def _forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return kernels.bias_gelu.bias_gelu_forward(x, bias, kernels.bias_gelu.KINDS[approximate])


def _backward(grad_out: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    kind = kernels.bias_gelu.KINDS[approximate]
    return kernels.bias_gelu.bias_gelu_backward(grad_out.contiguous(), x, bias, kind)


def _fake(x: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(x: Tensor, bias: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


_op = register("bias_gelu", _forward, _fake, _backward, _fake_backward, gradients="x bias")
