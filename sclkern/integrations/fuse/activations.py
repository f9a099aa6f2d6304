"""Which activations are a GELU."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern.integrations.fuse.modules import GeluKind
from sclkern.integrations.fuse.structure import clone


def gelu_kind(activation: Any) -> GeluKind | None:
    """Which GELU an activation computes.

    Args:
        activation: module or function; it is recognised by its values, in training too.

    Returns:
        ``approximate`` of ``ops.bias_gelu``, or None for any other activation.
    """
    if isinstance(activation, nn.Module):
        hooks = activation._forward_hooks or activation._forward_pre_hooks or "forward" in activation.__dict__
        state = [*activation.parameters(), *activation.buffers()]
        if hooks or state or any(isinstance(child, nn.Dropout) for child in activation.modules()):
            return None
    x = torch.cat([torch.linspace(-6, 6, 97), torch.tensor([-300.0, -20.0, 20.0, 300.0])]).expand(2, 3, -1)
    kinds: tuple[GeluKind, ...] = get_args(GeluKind)
    for kind in kinds:
        expected = x * torch.sigmoid(1.702 * x) if kind == "quick" else F.gelu(x, approximate=kind)
        # The exact GELU and its tanh approximation differ by up to 5e-4.
        if all(_close(values, expected) for values in _values(activation, x)):
            return kind
    return None


def _values(activation: Any, x: Tensor) -> list[Any]:
    """What it computes for ``x``, in evaluation and in training; a copy of it, because it may count its calls."""
    try:
        with torch.no_grad():
            if not isinstance(activation, nn.Module):
                return [activation(x.clone())]
            copied = clone(activation, "cpu", torch.float32)
            return [copied.train(mode)(x.clone()) for mode in (False, True)]
    except Exception:
        return [None]


def _close(values: Any, expected: Tensor) -> bool:
    if not isinstance(values, Tensor) or values.shape != expected.shape:
        return False
    return bool(((values - expected).abs() < 2e-5).all())
