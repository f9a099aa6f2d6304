"""Which modules can be fused: matched by structure, and known by their source or tried.

Modules are typed ``Any`` where a rule reads their attributes: which ones they have is what the rule finds out.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sclkern import nn as fused_nn
from sclkern.integrations.fuse import modules as fused
from sclkern.integrations.fuse import trial, within
from sclkern.integrations.fuse.activations import gelu_kind
from sclkern.integrations.fuse.attention import attention
from sclkern.integrations.fuse.blocks import pre_norm_block
from sclkern.integrations.fuse.contrast import completion_loss
from sclkern.integrations.fuse.doubts import doubt
from sclkern.integrations.fuse.masked_lm import masked_lm
from sclkern.integrations.fuse.modules import Gelu, Output, Swap, Verdict, fused_class
from sclkern.integrations.fuse.structure import attributes, beyond, child_obstacle, is_plain, signature
from sclkern.integrations.fuse.trial import Difference, Trial
from sclkern.integrations.fuse.vit import vit_attention, vit_mlp

_ON_KERNELS = "all calls, where kernels run; elsewhere the module's own forward"


def dropout_add_layer_norm(module: Any) -> Verdict:
    """{dense, LayerNorm, dropout}: the end of a BERT block."""
    children = ("dense", "LayerNorm", "dropout")
    if not _has_children(module, *children):
        return None
    kinds = {"dense": nn.Linear, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}
    if obstacle := child_obstacle(module, **kinds) or beyond(module, *children):
        return obstacle
    dense, norm = module.dense, module.LayerNorm
    if dense.bias is None or norm.bias is None or norm.weight is None or norm.weight.ndim != 1:
        return "a layer without bias, or a LayerNorm over several dimensions"
    names = _arguments(module)
    if names is None or len(names) != 2:
        return "its forward does not take two tensors"
    settings = Output(names, attributes(module, *children))
    reason = trial.once(module, fused.FusedOutput, lambda: _try_output(module, settings))
    if (reason := reason or doubt(type(module))) is not None:
        return str(reason)
    cls = fused_class(type(module), fused.FusedOutput)
    return Swap("ops.dropout_add_layer_norm", cls, {"_sclkern": settings}, calls=_ON_KERNELS, device="cuda")


def _try_output(module: Any, settings: Output) -> str | None:
    attempt = Trial(module, fused.FusedOutput, settings)
    inner, width = module.dense.in_features, module.dense.out_features

    def call(*shape: int) -> dict[str, Any]:
        x, residual = trial.random_input(attempt.dtype, *shape, inner), trial.random_input(attempt.dtype, *shape, width)
        return dict(zip(settings.names, (x, residual), strict=True))

    def by_parts(own: Any) -> torch.Tensor:
        x, residual = call(2, 3).values()
        hidden = own.dense(x)
        result: torch.Tensor = own.LayerNorm(hidden * trial.keep(hidden) + residual)
        return result

    with trial.quiet():
        try:
            attempt.train(False)
            attempt.compare("on a small input", call(2, 3), gradients=True)
            attempt.compare("on a large input", {name: 30 * value for name, value in call(1, 200).items()})
            for p in (0.0, 1.0):
                attempt.train(True, p)
                attempt.compare(f"in training with dropout {p:g}", call(2, 3), gradients=True)
            attempt.train(True, trial.Probe(0.5))
            attempt.equals("in training, where its dropout has another place", call(2, 3), by_parts)
            attempt.unchanged()
            attempt.on_kernels(call(2, 3))
        except Difference as difference:
            return str(difference)
    return None


def linear_gelu(module: Any) -> Verdict:
    """{dense, intermediate_act_fn}, {fc1, activation_fn, fc2}, a ``Sequential`` with a linear layer and a GELU, or both
    within a longer forward."""
    if type(module) is nn.Sequential:
        return _gelu_in_sequential(module)
    verdict: Verdict = None
    for first, activation, second in (("dense", "intermediate_act_fn", None), ("fc1", "activation_fn", "fc2")):
        children = (first,) if second is None else (first, second)
        if getattr(module, activation, None) is not None and _has_children(module, *children):
            verdict = _gelu_between(module, first, activation, second)
    for first, activation in within.PAIRS if not isinstance(verdict, Swap) else ():
        if getattr(module, activation, None) is not None and _has_children(module, first):
            found = _gelu_within(module, first, activation)
            # The whole module has the better reason, unless there is more in it.
            if isinstance(found, Swap) or not isinstance(verdict, str) or verdict.startswith("it also has"):
                verdict = found
    return verdict


def _gelu_within(module: Any, first: str, activation: str) -> Verdict:
    """A linear layer and its GELU among other things."""
    gelu, linear = getattr(module, activation), getattr(module, first)
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    kind = gelu_kind(gelu) if callable(gelu) else None
    if kind is None:
        return f"{_name(gelu)} is no GELU"
    if reason := child_obstacle(module, **{first: nn.Linear}):
        return reason
    if linear.bias is None:
        return f"its {first} has no bias"
    if reason := within.obstacle(type(module), first, activation) or doubt(_code(gelu)):
        return reason
    methods = within.only_methods(attributes(module, first, activation))
    settings = Gelu(first, activation, None, kind, signature(gelu), (), methods)
    cls = fused_class(type(module), within.FusedWithin)
    return Swap(f"ops.bias_gelu ({kind})", cls, {"_sclkern": settings}, calls=_ON_KERNELS, device="cuda")


def _gelu_between(module: Any, first: str, activation: str, second: str | None) -> Verdict:
    children = (first, activation) if second is None else (first, activation, second)
    gelu, linear = getattr(module, activation), getattr(module, first)
    if obstacle := beyond(module, *children) or child_obstacle(
        module, **dict.fromkeys((first, second or first), nn.Linear)
    ):
        return obstacle
    kind = gelu_kind(gelu)
    if kind is None:
        return f"{_name(gelu)} is no GELU"
    if linear.bias is None:
        return f"its {first} has no bias"
    names = _arguments(module)
    if names is None or len(names) != 1:
        return "its forward does not take one tensor"
    settings = Gelu(first, activation, second, kind, signature(gelu), names, attributes(module, *children))
    reason = trial.once(module, kind, lambda: _try_gelu(module, settings))
    if (reason := reason or doubt(type(module)) or doubt(_code(gelu))) is not None:
        return str(reason)
    cls = fused_class(type(module), fused.FusedGelu)
    return Swap(f"ops.bias_gelu ({kind})", cls, {"_sclkern": settings}, calls=_ON_KERNELS, device="cuda")


def _try_gelu(module: Any, settings: Gelu) -> str | None:
    attempt = Trial(module, fused.FusedGelu, settings)
    width = getattr(module, settings.first).in_features

    def call(*shape: int) -> dict[str, Any]:
        return {settings.names[0]: trial.random_input(attempt.dtype, *shape, width)}

    with trial.quiet():
        try:
            for mode in (False, True):
                attempt.train(mode)
                attempt.compare("in training" if mode else "on a small input", call(2, 3), gradients=True)
            attempt.compare("in training on a long input", call(1, 200))
            attempt.unchanged()
            attempt.on_kernels(call(2, 3))
        except Difference as difference:
            return str(difference)
    return None


def _gelu_in_sequential(module: nn.Sequential) -> Verdict:
    """Torch's own ``Sequential``, whose forward is known."""
    names = list(module._modules)
    found, reason = [], None
    for first, following in itertools.pairwise(names):
        linear, gelu = module._modules[first], module._modules[following]
        kind = gelu_kind(gelu) if type(linear) is nn.Linear and _may_be_gelu(gelu) else None
        if kind is None:
            continue
        reason = child_obstacle(module, **{first: nn.Linear}) or doubt(_code(gelu))
        if "forward" in module.__dict__:
            reason = "its forward was replaced on this instance"
        if not reason and linear.bias is not None:
            found.append(Gelu(first, following, None, kind, signature(gelu)))
    if not found:
        return reason or None
    by = f"ops.bias_gelu ({', '.join(sorted({entry.kind for entry in found}))})"
    cls = fused_class(nn.Sequential, fused.FusedSequential)
    return Swap(by, cls, {"_sclkern": tuple(found)}, calls=_ON_KERNELS, device="cuda")


def _may_be_gelu(module: Any) -> bool:
    """Whether a module can be a GELU: torch's GELU, or a module without parameters that is not one of torch's."""
    known = type(module).__module__.startswith("torch.nn.")
    return isinstance(module, nn.Module) and (type(module) is nn.GELU or not known) and is_plain(module, type(module))


def transformer_encoder(module: Any) -> Verdict:
    """``torch.nn.TransformerEncoderLayer`` and ``TransformerEncoder``."""
    if type(module) not in (nn.TransformerEncoderLayer, nn.TransformerEncoder):
        return None
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    calls = "calls without mask, is_causal or nested tensors; others: torch's attention"
    if type(module) is nn.TransformerEncoder:
        for layer in module.layers:
            if type(layer) is not fused_nn.TransformerEncoderLayer and not isinstance(transformer_encoder(layer), Swap):
                return f"its layers are {_name(layer)} that are left"
        return Swap("nn.TransformerEncoder", fused_nn.TransformerEncoder, {}, calls=calls)
    children: tuple[tuple[nn.Module, Swap], ...] = ()
    if type(module.self_attn) is not fused_nn.MultiheadAttention:
        inner = attention(module.self_attn)
        if not isinstance(inner, Swap):
            return f"its self_attn is left: {inner or _name(module.self_attn)}"
        children = ((module.self_attn, inner),)
    return Swap("nn.TransformerEncoderLayer", fused_nn.TransformerEncoderLayer, {}, children, calls=calls)


# The rule that changes what a model returns: it is applied only where that is asked for.
LOSS_OF_LOGITS = "linear_cross_entropy"
RULES: dict[str, Callable[[Any], Verdict]] = {
    "attention": lambda module: attention(module) or vit_attention(module),
    "completion_loss": completion_loss,
    "dropout_add_layer_norm": lambda module: dropout_add_layer_norm(module) or pre_norm_block(module),
    LOSS_OF_LOGITS: masked_lm,
    "linear_gelu": lambda module: linear_gelu(module) or vit_mlp(module),
    "transformer_encoder": transformer_encoder,
}


def _has_children(module: nn.Module, *names: str) -> bool:
    return all(isinstance(module._modules.get(name), nn.Module) for name in names)


def _arguments(module: nn.Module) -> tuple[str, ...] | None:
    """The arguments of a forward that has nothing else; None where it has optional ones."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = all(
        parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        for parameter in parameters
    )
    return tuple(parameter.name for parameter in parameters) if plain else None


def _code(activation: Any) -> Any:
    """What ``doubt`` reads of an activation."""
    return type(activation) if isinstance(activation, nn.Module) else getattr(activation, "func", activation)


def _name(thing: Any) -> str:
    return type(thing).__name__ if isinstance(thing, nn.Module) else getattr(thing, "__name__", type(thing).__name__)
