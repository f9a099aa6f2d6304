"""Trying a module on a small input, to compare its forward with what the fused ops would compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import reference
from sclkern.integrations.fuse.modules import GeluKind


def evaluate(module: nn.Module, *calls: Callable[[], Any]) -> list[Any]:
    """Run calls in evaluation mode, without gradients or autocast.

    Args:
        module: the module that the calls use; its modes are restored afterwards.
        *calls: what to run.

    Returns:
        Their results.
    """
    modes = [(child, child.training) for child in module.modules()]
    results = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for call in calls:
                module.eval()
                results.append(call())
        finally:
            for child, training in modes:
                child.training = training
    return results


def agree(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether results are equal up to rounding.

    Args:
        actual: what the module computes.
        expected: what the fused module would compute.

    Returns:
        False if any shape differs, or any tensor by more than the tolerance, relative to its norm.
    """
    for theirs, ours in zip(actual, expected, strict=True):
        # Wide, because a GPU may round products to TF32; another formula differs by more.
        tolerance = 1e-2 if torch.finfo(ours.dtype).bits > 16 else 5e-2
        if theirs.shape != ours.shape or not (theirs - ours).float().norm() <= tolerance * ours.float().norm():
            return False
    return True


def random_input(like: Tensor, *shape: int) -> Tensor:
    """Draw an input from a separate generator, so that fusing a model changes none of its random numbers.

    Args:
        like: tensor whose dtype and device the input gets.
        *shape: its shape.

    Returns:
        Normally distributed values, the same in every call with one shape.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def attention_calls(module: Any, names: tuple[str, ...], width: int) -> Iterator[dict[str, Any]]:
    """Arguments to try an attention with: self-attention, a padding mask, cross-attention.

    Args:
        module: attention with children {query, key, value} or {qkv, projection}.
        names: arguments of its forward.
        width: channels of its hidden states.

    Yields:
        Keyword arguments of one call.
    """
    weight = next(module.parameters())
    key = getattr(module, "key", None)
    hidden = random_input(weight, 2, 5, width)
    if key is not None:
        # Large scores: with small ones, the softmax is flat at any scale.
        hidden = hidden * (3.0 / _largest_score(module, hidden)).clamp_max(100.0).to(weight.dtype)
    mask = torch.zeros((2, 1, 1, 5), dtype=weight.dtype, device=weight.device)
    mask[0, ..., 3:] = torch.finfo(weight.dtype).min
    if key is None or key.in_features == width:
        yield {"hidden_states": hidden}
        if "attention_mask" in names:
            yield {"hidden_states": hidden, "attention_mask": mask}
    if key is not None and "encoder_hidden_states" in names:
        context = random_input(weight, 2, 5, key.in_features)
        yield {"hidden_states": hidden, "encoder_hidden_states": context}
        if "encoder_attention_mask" in names:
            yield {"hidden_states": hidden, "encoder_hidden_states": context, "encoder_attention_mask": mask}


def _largest_score(module: Any, hidden: Tensor) -> Tensor:
    """Square root of roughly the largest score of ``hidden``, at least 1e-3; () float32."""
    width = module.query.out_features
    with torch.no_grad():
        query = module.query(hidden).float()
        key = module.key(random_input(hidden, *hidden.shape[:-1], module.key.in_features)).float()
    largest: Tensor = (query @ key.transpose(-1, -2)).abs().max()
    return largest.div(width**0.5).clamp_min(1e-6).sqrt()


def eager_attention(
    module: Any,
    heads: int,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """The eager definition of what the fused attention computes.

    Args:
        module: attention with children {query, key, value} or {qkv, projection}.
        heads: number of heads.
        hidden_states: (B, Lq, W).
        attention_mask: (B, 1, 1, Lq), 0 = attend; for self-attention.
        encoder_hidden_states: (B, Lk, W), the context; None = self-attention.
        encoder_attention_mask: (B, 1, 1, Lk), 0 = attend; for the context.

    Returns:
        (B, Lq, W).
    """
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
    mask = None if mask is None else mask[:, 0, 0] == 0
    packed = hasattr(module, "qkv")
    if packed:
        query, key, value = module.qkv(hidden_states).unflatten(-1, (3, heads, -1)).unbind(2)
    else:
        projected = module.query(hidden_states), module.key(context), module.value(context)
        query, key, value = (tensor.unflatten(-1, (heads, -1)) for tensor in projected)
    out: Any = reference.attention(query, key, value, key_padding_mask=mask)
    merged: Tensor = out.flatten(-2)
    return module.projection(merged) if packed else merged


def gelu_kind(activation: Any) -> GeluKind | None:
    """Which GELU an activation computes.

    Args:
        activation: module or function; it is recognised by its values.

    Returns:
        ``approximate`` of ``ops.bias_gelu``, or None for any other activation.
    """
    if isinstance(activation, nn.Module) and (list(activation.parameters()) or activation._forward_hooks):
        return None
    x = torch.linspace(-6, 6, 97)
    try:
        with torch.no_grad():
            values = activation(x)
    except Exception:
        return None
    if not isinstance(values, Tensor) or values.shape != x.shape:
        return None
    kinds: tuple[GeluKind, ...] = get_args(GeluKind)
    for kind in kinds:
        expected = x * torch.sigmoid(1.702 * x) if kind == "quick" else F.gelu(x, approximate=kind)
        # The exact GELU and its tanh approximation differ by up to 5e-4.
        if bool(((values - expected).abs() < 2e-5).all()):
            return kind
    return None
