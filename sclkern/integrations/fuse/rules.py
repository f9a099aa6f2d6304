"""Which modules can be fused: by structure, confirmed by comparing both forwards on a small input."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import nn as fused_nn
from sclkern import reference
from sclkern.integrations.fuse import modules as fused
from sclkern.integrations.fuse.modules import Attention, Block, Fused, Gelu, is_plain
from sclkern.ops.bias_gelu import KINDS


class Swap(NamedTuple):
    """What replaces a module's class, and what is set on it."""

    by: str
    cls: type[nn.Module]
    attributes: dict[str, Any]
    # Children that must be replaced with it.
    also: tuple[tuple[nn.Module, Swap], ...] = ()


# What a rule says of a module: nothing (None), how to replace it, or why it stays as it is.
Verdict = Swap | str | None


def dropout_add_layer_norm(module: nn.Module) -> Verdict:
    if not _has_children(module, "dense", "LayerNorm", "dropout"):
        return None
    dense, norm, dropout = module.dense, module.LayerNorm, module.dropout
    unusual = _unusual(module, dense=nn.Linear, LayerNorm=nn.LayerNorm, dropout=nn.Dropout)
    if unusual:
        return unusual
    if dense.bias is None or norm.bias is None or norm.weight.ndim != 1:
        return "a layer without bias, or a LayerNorm over several dimensions"
    x, residual = _random(dense.weight, 3, dense.in_features), _random(dense.weight, 3, dense.out_features)

    def dropped() -> Tensor:
        dropout.train()
        kept, dropout.p = dropout.p, 1.0
        try:
            return module(x, residual)
        finally:
            dropout.p = kept

    found = _both(module, lambda: module(x, residual), dropped)
    expected = _both(module, lambda: norm(dense(x) + residual), lambda: norm(residual))
    return _swap(module, fused.FusedOutput, "ops.dropout_add_layer_norm", found, expected)


def linear_gelu(module: nn.Module) -> Verdict:
    for first, activation, second in (("dense", "intermediate_act_fn", None), ("fc1", "activation_fn", "fc2")):
        if getattr(module, activation, None) is None or not _has_children(module, first, *filter(None, (second,))):
            continue
        if _unusual(module, **{first: nn.Linear}):
            return _unusual(module, **{first: nn.Linear})
        act, layer, last = getattr(module, activation), getattr(module, first), getattr(module, second or "", _same)
        kind = _gelu_kind(act)
        if kind is None or layer.bias is None:
            return f"{_name(act)} is no GELU, or {first} has no bias"
        x = _random(layer.weight, 3, layer.in_features)
        found, expected = _both(module, lambda: module(x)), _both(module, lambda: last(act(layer(x))))  # noqa: B023
        by = f"ops.bias_gelu ({kind})"
        return _swap(module, fused.FusedGelu, by, found, expected, _sclkern=Gelu(first, second, kind))
    if not _has_children(module, "attn", "ln_1", "mlp", "ln_2") or not hasattr(module, "attention"):
        return None
    mlp = module.mlp
    if list(dict(mlp.named_children())) != ["c_fc", "gelu", "c_proj"]:
        return "its mlp is not {c_fc, gelu, c_proj}"
    unusual = _unusual(mlp, c_fc=nn.Linear) or ("mlp carries hooks" if mlp._forward_hooks else None)
    if unusual:
        return unusual
    kind = _gelu_kind(mlp.gelu)
    if kind is None or mlp.c_fc.bias is None:
        return f"{_name(mlp.gelu)} is no GELU, or c_fc has no bias"
    needs_mask = inspect.signature(module.attention).parameters.values()
    needs_mask = sum(parameter.default is inspect.Parameter.empty for parameter in needs_mask) > 1
    x = _random(mlp.c_fc.weight, 3, 1, mlp.c_fc.in_features)

    def parts() -> Tensor:
        middle = x + module.attention(module.ln_1(x), *(None,) * needs_mask)
        return middle + mlp.c_proj(mlp.gelu(mlp.c_fc(module.ln_2(middle))))

    found, expected = _both(module, lambda: module(x)), _both(module, parts)
    by = f"ops.bias_gelu ({kind})"
    return _swap(module, fused.FusedBlock, by, found, expected, _sclkern=Block(kind, needs_mask))


def attention(module: nn.Module) -> Verdict:
    """Attention that has a forward of its own; what asks Hugging Face's interface is ``dispatches``."""
    if type(module) is nn.MultiheadAttention:
        return Swap("nn.MultiheadAttention", fused_nn.MultiheadAttention, {"backend": "auto"})
    separate = _has_children(module, "query", "key", "value", "dropout")
    if not separate and not _has_children(module, "qkv", "projection", "dropout"):
        return None
    linear = dict.fromkeys(("query", "key", "value") if separate else ("qkv", "projection"), nn.Linear)
    unusual = _unusual(module, **linear, dropout=nn.Dropout)
    if unusual:
        return unusual
    heads = getattr(module, "num_attention_heads", getattr(module, "num_heads", None))
    first = module.query if separate else module.projection
    width = first.out_features
    if not isinstance(heads, int) or heads < 1 or width % heads:
        return "it does not say how many heads it has"
    if getattr(module, "position_embedding_type", None) not in (None, "absolute"):
        return "relative positions are added to the scores"
    names = tuple(inspect.signature(module.forward).parameters)
    if names[:1] != ("hidden_states",):
        return "its forward does not begin with hidden_states"
    calls = list(_attention_calls(module, names, first.in_features))
    cls = fused.FusedSelfAttention if separate else fused.FusedPackedAttention
    try:
        found = _both(module, *(lambda call=call: module(**call) for call in calls))
    except Exception as error:
        return f"its forward cannot be tried: {type(error).__name__}: {error}"
    outputs = {len(out) if isinstance(out, tuple) else 0 for out in found}
    if len(outputs) != 1:
        return "how much its forward returns depends on what it gets"
    settings = Attention(names, outputs.pop(), heads)
    found = [out[0] if isinstance(out, tuple) else out for out in found]
    expected = _both(module, *(lambda call=call: _plain_attention(module, heads, **call) for call in calls))
    return _swap(module, cls, "ops.attention", found, expected, _sclkern=settings)


def dispatches(module: nn.Module) -> bool:
    """Whether the module asks ``transformers.AttentionInterface`` for its attention."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def transformer_encoder(module: nn.Module) -> Verdict:
    if type(module) is nn.TransformerEncoderLayer:
        if type(module.self_attn) is fused_nn.MultiheadAttention:
            return Swap("nn.TransformerEncoderLayer", fused_nn.TransformerEncoderLayer, {})
        inner = attention(module.self_attn)
        if not isinstance(inner, Swap):
            return f"its self_attn is {_name(module.self_attn)}"
        return Swap("nn.TransformerEncoderLayer", fused_nn.TransformerEncoderLayer, {}, ((module.self_attn, inner),))
    if type(module) is nn.TransformerEncoder:
        return Swap("nn.TransformerEncoder", fused_nn.TransformerEncoder, {})
    return None


def completion_loss(module: nn.Module) -> Verdict:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = set() if code is None else {*code.co_names}
    if not names & {"clip_loss", "image_text_contrastive_loss"} or not hasattr(module, "config"):
        return None
    scale = getattr(module, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.ndim:
        return "it has no logit_scale"
    return Swap("ops.completion_loss", fused.fused_class(type(module), fused.FusedContrast), {})


RULES: dict[str, Callable[[nn.Module], Verdict]] = {
    "attention": attention,
    "completion_loss": completion_loss,
    "dropout_add_layer_norm": dropout_add_layer_norm,
    "linear_gelu": linear_gelu,
    "transformer_encoder": transformer_encoder,
}


def _has_children(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _unusual(module: nn.Module, **kinds: type[nn.Module]) -> str | None:
    """Which child is not what it should be, or the parameter that cannot be computed with."""
    for name, kind in kinds.items():
        child = getattr(module, name)
        if type(child) is not kind:
            return f"its {name} is {_name(child)}, not torch's {kind.__name__}"
        if not is_plain(child, kind):
            return f"its {name} carries hooks"
        if any(parameter.is_meta for parameter in child.parameters()):
            return "its parameters are on the meta device"
    return None


def _swap(module: nn.Module, mixin: type[Fused], by: str, found: list, expected: list, **attributes) -> Verdict:
    for theirs, ours in zip(found, expected, strict=True):
        # Wide, because a GPU may round products to TF32; another formula is farther off.
        tolerance = 1e-2 if torch.finfo(ours.dtype).bits > 16 else 5e-2
        if theirs.shape != ours.shape or not (theirs - ours).float().norm() <= tolerance * ours.float().norm():
            return "its forward computes something else"
    return Swap(by, fused.fused_class(type(module), mixin), attributes)


def _both(module: nn.Module, *calls: Callable[[], Any]) -> list:
    """The results of ``calls`` in evaluation mode, without gradients, autocast or a change of the module's modes."""
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


def _random(like: Tensor, *shape: int) -> Tensor:
    # Of its own generator: a model that is fused draws the numbers it would have drawn.
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _attention_calls(module: nn.Module, names: tuple[str, ...], width: int) -> Iterator[dict[str, Any]]:
    """Arguments to try the attention ``module`` with: to itself, under a padding mask, to a context."""
    weight = next(module.parameters())
    key = getattr(module, "key", None)
    hidden = _random(weight, 2, 5, width)
    if key is not None:
        # Scores of some size, else the softmax is flat whatever their scale.
        hidden = hidden * (3.0 / _largest_score(module, hidden)).clamp_max(100.0).to(weight.dtype)
    mask = torch.zeros((2, 1, 1, 5), dtype=weight.dtype, device=weight.device)
    mask[0, ..., 3:] = torch.finfo(weight.dtype).min
    if key is None or key.in_features == width:
        yield {"hidden_states": hidden}
        if "attention_mask" in names:
            yield {"hidden_states": hidden, "attention_mask": mask}
    if key is not None and "encoder_hidden_states" in names:
        context = _random(weight, 2, 5, key.in_features)
        yield {"hidden_states": hidden, "encoder_hidden_states": context}
        if "encoder_attention_mask" in names:
            yield {"hidden_states": hidden, "encoder_hidden_states": context, "encoder_attention_mask": mask}


def _largest_score(module: nn.Module, hidden: Tensor) -> Tensor:
    """Square root of about the largest score that ``hidden`` gives, at least 1e-3; () float32."""
    width = module.query.out_features
    with torch.no_grad():
        query = module.query(hidden).float()
        key = module.key(_random(hidden, *hidden.shape[:-1], module.key.in_features)).float()
    return (query @ key.transpose(-1, -2)).abs().max().div(width**0.5).clamp_min(1e-6).sqrt()


def _plain_attention(
    module: nn.Module,
    heads: int,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """What the fused module will compute, by its definition."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
    mask = None if mask is None else mask[:, 0, 0] == 0
    if hasattr(module, "qkv"):
        tensors = module.qkv(hidden_states).unflatten(-1, (3, heads, -1)).unbind(2)
    else:
        tensors = (module.query(hidden_states), module.key(context), module.value(context))
        tensors = [tensor.unflatten(-1, (heads, -1)) for tensor in tensors]
    out = reference.attention(*tensors, key_padding_mask=mask).flatten(-2)
    return module.projection(out) if hasattr(module, "qkv") else out


def _gelu_kind(activation: Any) -> str | None:
    """The kind of ``ops.bias_gelu`` that ``activation`` computes, told by its values, or None."""
    if isinstance(activation, nn.Module) and (list(activation.parameters()) or activation._forward_hooks):
        return None
    x = torch.linspace(-6, 6, 97)
    try:
        with torch.no_grad():
            found = activation(x)
    except Exception:
        return None
    for kind in KINDS:
        # The exact GELU and that by tanh are 5e-4 apart.
        if isinstance(found, Tensor) and found.shape == x.shape:
            expected = x * torch.sigmoid(1.702 * x) if kind == "quick" else F.gelu(x, approximate=kind)
            if bool(((found - expected).abs() < 2e-5).all()):
                return kind
    return None


def _name(thing: Any) -> str:
    return type(thing).__name__ if isinstance(thing, nn.Module) else getattr(thing, "__name__", type(thing).__name__)


def _same(x: Tensor) -> Tensor:
    return x
