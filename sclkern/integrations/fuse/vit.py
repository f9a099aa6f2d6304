"""Rules for vision transformers like timm's: attention {qkv, attn_drop, proj, proj_drop} and MLP {fc1, act, fc2}.

An attention is taken where the text of its forward is one that was examined (section "forwards" of ``known.json``),
because its dropout lies within torch's attention, where no trial can see its place; an MLP by structure and trial.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from sclkern.integrations.fuse import trial
from sclkern.integrations.fuse.activations import gelu_kind
from sclkern.integrations.fuse.doubts import doubt
from sclkern.integrations.fuse.modules import Gelu, Swap, Verdict, fused_class
from sclkern.integrations.fuse.structure import attributes, beyond, child_obstacle, signature
from sclkern.integrations.fuse.trial import Difference, Trial
from sclkern.integrations.fuse.vit_modules import FusedMlp, FusedViTAttention, Mlp, ViTAttention
from sclkern.integrations.source import forward_digest, known, source_digest

UNKNOWN = "the text of its forward is not one that was examined"
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_DROPOUTS = ("attn_drop", "proj_drop")
_NORMS = ("q_norm", "k_norm", "norm")
_BIASES = ("q_bias", "k_bias", "v_bias")
# BEiT's relative position bias, and what its method that makes the bias reads anew in each call.
_TABLE = ("relative_position_bias_table", "relative_position_index")
_SIZES = ("window_size", "num_relative_distance")
# What follows the GELU: timm's, that of its older versions and its copies, and without a first dropout.
_AFTER_GELU = (
    ("drop1", "norm", "fc2", "drop2"), ("drop1", "fc2", "drop2"), ("drop", "fc2", "drop"), ("fc2", "drop"),
)  # fmt: skip


def known_form(module: nn.Module, named: bool = False) -> str | None:
    """What the forward of a module computes, where its text was examined.

    Args:
        module: the module.
        named: whether its class must be one in which the text was found.

    Returns:
        The "form" of the table, or None.
    """
    if "forward" in module.__dict__:
        return None
    cls = type(module)
    entry = known("forwards").get(forward_digest(cls) or "")
    if entry is None or (named and f"{cls.__module__}:{cls.__qualname__}" not in entry["names"]):
        return None
    return str(entry["form"])


def norm_obstacle(name: str, norm: Any) -> str | None:
    """The reason not to know what a norm computes, or None.

    Args:
        name: its name in its parent.
        norm: torch's or timm's.

    Returns:
        The reason, such as "its q_norm is ScaleNorm, which is not known".
    """
    if "forward" in norm.__dict__:
        return f"the forward of its {name} was replaced"
    kinds = (nn.Identity, nn.LayerNorm, nn.RMSNorm)
    if type(norm) in kinds or source_digest(type(norm)) in known("norms"):
        return None
    return f"its {name} is {type(norm).__name__}, which is not known"


def vit_attention(module: Any) -> Verdict:
    """{qkv, attn_drop, proj, proj_drop}: the attention of timm's ViT, DeiT, EVA and BEiT, and its copies."""
    children = module._modules
    packed = children.get("qkv") is not None
    linears = ("qkv", "proj") if packed else (*_SEPARATE, "proj")
    if any(not isinstance(children.get(name), nn.Module) for name in (*linears, *_DROPOUTS)):
        return None
    biased = getattr(module, _TABLE[0], None) is not None
    if biased and known_form(module) != "attention with bias":
        return "its relative position bias changes its scores, in a forward whose text is not one that was examined"
    table = _TABLE if biased else ()
    norms = [name for name in _NORMS if children.get(name) is not None]
    gate = ("gate",) if children.get("gate") is not None else ()
    kinds = dict.fromkeys((*linears, *gate), nn.Linear) | dict.fromkeys(_DROPOUTS, nn.Dropout)
    if obstacle := beyond(module, *linears, *_DROPOUTS, *norms, *gate, *_BIASES, *table) or child_obstacle(
        module, **kinds
    ):
        return obstacle
    if obstacle := next(filter(None, (norm_obstacle(name, children[name]) for name in norms)), None):
        return obstacle
    if known_form(module) not in ("attention", "attention with bias"):
        return UNKNOWN
    heads, width = module.num_heads, module.qkv.out_features // 3 if packed else module.q_proj.out_features
    if not isinstance(heads, int) or heads < 1 or width % heads:
        return "it does not state its number of heads"
    if abs(module.scale * (width // heads) ** 0.5 - 1) > 1e-6:
        return f"its scale is {module.scale:g}, not that of torch's attention"
    if getattr(module, "num_kv_groups", 1) != 1:
        return "several queries share a key, which torch's attention computes"
    names = tuple(inspect.signature(module.forward).parameters)
    settings = ViTAttention(names, heads, attributes(module, *children, *_BIASES, *_TABLE, *_SIZES))
    reason = trial.once(module, FusedViTAttention, lambda: _try_attention(module, settings, width // heads))
    if reason is not None:
        return str(reason)
    calls = "self-attention without a mask; with attn_mask or is_causal: the module's own forward"
    if "shared_rel_pos_bias" in names:
        calls = "self-attention, with its relative position bias and a shared one"
    return Swap("ops.attention", fused_class(type(module), FusedViTAttention), {"_sclkern": settings}, calls=calls)


def _try_attention(module: Any, settings: ViTAttention, head: int) -> str | None:
    attempt = Trial(module, FusedViTAttention, settings)
    name, linear = settings.names[0], getattr(module, "qkv", None) or module.q_proj
    prefix = int(getattr(module, "num_prefix_tokens", 0))

    # With a table of relative positions, the module has one length.
    index = getattr(module, _TABLE[1], None)
    short, long = (prefix + 5, prefix + 200) if index is None else index.shape[:1] * 2
    option = next((option for option in ("rope", "shared_rel_pos_bias") if option in settings.names), None)

    def call(length: int, more: bool) -> dict[str, Any]:
        inputs: dict[str, Any] = {name: 2 * trial.random_input(attempt.dtype, 2, length, linear.in_features)}
        if more and option == "rope":
            inputs[option] = trial.random_input(attempt.dtype, length - prefix, 2 * head)
        elif more and option is not None:
            inputs[option] = trial.random_input(attempt.dtype, 1, settings.heads, length, length)
        return inputs

    with trial.quiet():
        try:
            for more in (False, True) if option is not None else (False,):
                where = f"with {option}" if more else "on a small input"
                attempt.train(False)
                attempt.compare(where, call(short, more), gradients=True)
                if long != short:
                    attempt.compare(f"{where}, longer", call(long, more))
                for p in (0.0, 1.0):
                    attempt.train(True, p)
                    attempt.compare(f"in training with dropout {p:g}", call(short, more), gradients=True)
            attempt.unchanged()
            attempt.on_kernels(call(short, option == "shared_rel_pos_bias"))
        except Difference as difference:
            return str(difference)
    return None


def vit_mlp(module: Any) -> Verdict:
    """{fc1, act, drop, fc2}: the MLP of timm's models, and its copies; its dropout is kept."""
    children = module._modules
    present = {name for name, child in children.items() if child is not None}
    if not {"fc1", "act", "fc2"} <= present:
        return None
    rest = next((order for order in _AFTER_GELU if present == {"fc1", "act", *order}), None)
    if rest is None:
        return None
    drops = [name for name in rest if name.startswith("drop")]
    kinds = dict.fromkeys(("fc1", "fc2"), nn.Linear) | dict.fromkeys(drops, nn.Dropout)
    if obstacle := beyond(module, "fc1", "act", *rest) or child_obstacle(module, **kinds):
        return obstacle
    if "norm" in rest and (obstacle := norm_obstacle("norm", module.norm)):
        return obstacle
    kind = gelu_kind(module.act)
    if kind is None:
        return f"{type(module.act).__name__} is no GELU"
    if module.fc1.out_features != module.fc2.in_features:
        return "its fc2 does not read what its fc1 writes"
    if module.fc1.bias is None:
        return "its fc1 has no bias"
    parameters = inspect.signature(module.forward).parameters.values()
    if len(parameters) != 1 or any(one.kind is not one.POSITIONAL_OR_KEYWORD for one in parameters):
        return "its forward does not take one tensor"
    names = tuple(one.name for one in parameters)
    gelu = Gelu("fc1", "act", None, kind, signature(module.act), names, attributes(module, *children))
    settings = Mlp(gelu, rest)
    reason = trial.once(module, kind, lambda: _try_mlp(module, settings))
    if (reason := reason or doubt(type(module)) or doubt(type(module.act))) is not None:
        return str(reason)
    calls = "all calls, where kernels run; elsewhere the module's own forward"
    cls = fused_class(type(module), FusedMlp)
    return Swap(f"ops.bias_gelu ({kind})", cls, {"_sclkern": settings}, calls=calls, device="cuda")


def _try_mlp(module: Any, settings: Mlp) -> str | None:
    attempt = Trial(module, FusedMlp, settings)

    def call(*shape: int) -> dict[str, Any]:
        return {settings.gelu.names[0]: trial.random_input(attempt.dtype, *shape, module.fc1.in_features)}

    def by_parts(own: Any) -> Tensor:
        (hidden,) = call(2, 3).values()
        for name in ("fc1", "act", *settings.rest):
            hidden = getattr(own, name)(hidden)
        return hidden

    with trial.quiet():
        try:
            attempt.train(False)
            attempt.compare("on a small input", call(2, 3), gradients=True)
            attempt.compare("on a long input", call(1, 200))
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
