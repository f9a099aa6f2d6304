"""Which modules can be fused: matched by structure, confirmed by comparing both forwards on a small input.

Modules are typed ``Any`` where a rule reads their attributes: which ones they have is what the rule finds out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sclkern import nn as fused_nn
from sclkern.integrations.fuse import modules as fused
from sclkern.integrations.fuse import trial
from sclkern.integrations.fuse.contrast import completion_loss
from sclkern.integrations.fuse.modules import Attention, Block, Fused, Gelu, Swap, Verdict, is_plain


def dropout_add_layer_norm(module: Any) -> Verdict:
    """{dense, LayerNorm, dropout}: the end of a BERT block."""
    if not _has_children(module, "dense", "LayerNorm", "dropout"):
        return None
    dense, norm, dropout = module.dense, module.LayerNorm, module.dropout
    if obstacle := _obstacle(module, dense=nn.Linear, LayerNorm=nn.LayerNorm, dropout=nn.Dropout):
        return obstacle
    if dense.bias is None or norm.bias is None or norm.weight.ndim != 1:
        return "a layer without bias, or a LayerNorm over several dimensions"
    x = trial.random_input(dense.weight, 3, dense.in_features)
    residual = trial.random_input(dense.weight, 3, dense.out_features)

    def drop_all() -> Tensor:
        dropout.train()
        p, dropout.p = dropout.p, 1.0
        try:
            out: Tensor = module(x, residual)
            return out
        finally:
            dropout.p = p

    actual = trial.evaluate(module, lambda: module(x, residual), drop_all)
    expected = trial.evaluate(module, lambda: norm(dense(x) + residual), lambda: norm(residual))
    return _swap(module, fused.FusedOutput, "ops.dropout_add_layer_norm", actual, expected)


def linear_gelu(module: Any) -> Verdict:
    """{dense, intermediate_act_fn}, {fc1, activation_fn, fc2}, or CLIP's block as OpenAI writes it."""
    for first, activation, second in (("dense", "intermediate_act_fn", None), ("fc1", "activation_fn", "fc2")):
        children = (first,) if second is None else (first, second)
        if getattr(module, activation, None) is not None and _has_children(module, *children):
            return _gelu_between(module, first, activation, second)
    if _has_children(module, "attn", "ln_1", "mlp", "ln_2") and hasattr(module, "attention"):
        return _gelu_in_block(module)
    return None


def _gelu_between(module: Any, first: str, activation: str, second: str | None) -> Verdict:
    if obstacle := _obstacle(module, **{first: nn.Linear}):
        return obstacle
    gelu, linear = getattr(module, activation), getattr(module, first)
    following = nn.Identity() if second is None else getattr(module, second)
    kind = trial.gelu_kind(gelu)
    if kind is None or linear.bias is None:
        return f"{_name(gelu)} is no GELU, or {first} has no bias"
    x = trial.random_input(linear.weight, 3, linear.in_features)
    actual = trial.evaluate(module, lambda: module(x))
    expected = trial.evaluate(module, lambda: following(gelu(linear(x))))
    by = f"ops.bias_gelu ({kind})"
    return _swap(module, fused.FusedGelu, by, actual, expected, _sclkern=Gelu(first, second, kind))


def _gelu_in_block(module: Any) -> Verdict:
    mlp = module.mlp
    if list(dict(mlp.named_children())) != ["c_fc", "gelu", "c_proj"]:
        return "its mlp is not {c_fc, gelu, c_proj}"
    if obstacle := _obstacle(mlp, c_fc=nn.Linear):
        return obstacle
    if mlp._forward_hooks:
        return "mlp carries hooks"
    kind = trial.gelu_kind(mlp.gelu)
    if kind is None or mlp.c_fc.bias is None:
        return f"{_name(mlp.gelu)} is no GELU, or c_fc has no bias"
    parameters = inspect.signature(module.attention).parameters.values()
    needs_mask = sum(parameter.default is inspect.Parameter.empty for parameter in parameters) > 1
    x = trial.random_input(mlp.c_fc.weight, 3, 1, mlp.c_fc.in_features)

    def by_parts() -> Tensor:
        middle = x + module.attention(module.ln_1(x), *(None,) * needs_mask)
        out: Tensor = middle + mlp.c_proj(mlp.gelu(mlp.c_fc(module.ln_2(middle))))
        return out

    actual, expected = trial.evaluate(module, lambda: module(x)), trial.evaluate(module, by_parts)
    by = f"ops.bias_gelu ({kind})"
    return _swap(module, fused.FusedBlock, by, actual, expected, _sclkern=Block(kind, needs_mask))


def attention(module: Any) -> Verdict:
    """Attention with its own forward; ``huggingface.fusing`` has modules that use Hugging Face's interface."""
    if type(module) is nn.MultiheadAttention:
        return Swap("nn.MultiheadAttention", fused_nn.MultiheadAttention, {"backend": "auto"})
    separate = _has_children(module, "query", "key", "value", "dropout")
    if not separate and not _has_children(module, "qkv", "projection", "dropout"):
        return None
    linear = dict.fromkeys(("query", "key", "value") if separate else ("qkv", "projection"), nn.Linear)
    if obstacle := _obstacle(module, **linear, dropout=nn.Dropout):
        return obstacle
    heads = getattr(module, "num_attention_heads", getattr(module, "num_heads", None))
    first = module.query if separate else module.projection
    width = first.out_features
    if not isinstance(heads, int) or heads < 1 or width % heads:
        return "it does not state its number of heads"
    if getattr(module, "position_embedding_type", None) not in (None, "absolute"):
        return "relative positions are added to the scores"
    names = tuple(inspect.signature(module.forward).parameters)
    if names[:1] != ("hidden_states",):
        return "its forward does not begin with hidden_states"
    calls = list(trial.attention_calls(module, names, first.in_features))
    cls = fused.FusedSelfAttention if separate else fused.FusedPackedAttention
    try:
        results = trial.evaluate(module, *(lambda call=call: module(**call) for call in calls))
    except Exception as error:
        return f"its forward cannot be tried: {type(error).__name__}: {error}"
    outputs = {len(out) if isinstance(out, tuple) else 0 for out in results}
    if len(outputs) != 1:
        return "the number of its outputs depends on its inputs"
    settings = Attention(names, outputs.pop(), heads)
    actual = [out[0] if isinstance(out, tuple) else out for out in results]
    expected = trial.evaluate(
        module, *(lambda call=call: trial.eager_attention(module, heads, **call) for call in calls)
    )
    return _swap(module, cls, "ops.attention", actual, expected, _sclkern=settings)


def transformer_encoder(module: Any) -> Verdict:
    """``torch.nn.TransformerEncoderLayer`` and ``TransformerEncoder``."""
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


RULES: dict[str, Callable[[Any], Verdict]] = {
    "attention": attention,
    "completion_loss": completion_loss,
    "dropout_add_layer_norm": dropout_add_layer_norm,
    "linear_gelu": linear_gelu,
    "transformer_encoder": transformer_encoder,
}


def _has_children(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _obstacle(module: nn.Module, **kinds: type[nn.Module]) -> str | None:
    """The reason why a child of the module, by name and expected class, cannot be computed by an op, or None."""
    for name, kind in kinds.items():
        child = getattr(module, name)
        if type(child) is not kind:
            return f"its {name} is {_name(child)}, not torch's {kind.__name__}"
        if not is_plain(child, kind):
            return f"its {name} carries hooks"
        if any(parameter.is_meta for parameter in child.parameters()):
            return "its parameters are on the meta device"
    return None


def _swap(
    module: nn.Module, mixin: type[Fused], by: str, actual: list[Tensor], expected: list[Tensor], **attributes: Any
) -> Verdict:
    if not trial.agree(actual, expected):
        return "its forward computes something else"
    return Swap(by, fused.fused_class(type(module), mixin), attributes)


def _name(thing: Any) -> str:
    return type(thing).__name__ if isinstance(thing, nn.Module) else getattr(thing, "__name__", type(thing).__name__)
