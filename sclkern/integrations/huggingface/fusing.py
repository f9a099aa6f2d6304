"""What ``sclkern.fuse`` does in models that use Hugging Face's attention interface."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from sclkern.integrations.huggingface.interface import register_attention
from sclkern.integrations.huggingface.maps import MapRequest, note_request

IMPLEMENTATION = "sclkern"
# Attention implementations of Hugging Face that use torch, and that ours may replace.
_REPLACEABLE = ("eager", "sdpa")


def forward_names(module: nn.Module) -> set[str]:
    """The global names that the module's forward uses."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else {*code.co_names}


def dispatches(module: nn.Module) -> bool:
    """Whether the module takes its attention from ``transformers.AttentionInterface``."""
    return "ALL_ATTENTION_FUNCTIONS" in forward_names(module) and hasattr(module, "config")


def obstacle(module: Any) -> str | None:
    """The reason why the attention of a module that ``dispatches`` is left, or None."""
    implementation = module.config._attn_implementation
    if implementation == IMPLEMENTATION:
        return "fused already"
    if implementation not in (*_REPLACEABLE, None):
        return f"its attention is {implementation!r} by choice"
    return None


def configure(model: nn.Module, attentions: list[nn.Module], undo: list[Callable[[], Any]]) -> None:
    """Select our attention and masks in Hugging Face configurations, and pass on requests for attention maps.

    Args:
        model: the model that is fused. Its configurations are replaced by copies, since other models may share them.
        attentions: fused attention modules.
        undo: gets the steps that undo this, in the order in which they are made.
    """
    # Imported in a function: transformers is loaded already, see ``fuse``, and sclkern works without it.
    from transformers import PreTrainedModel

    owners = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    register_attention(IMPLEMENTATION)
    requests = {path: MapRequest() for path in owners}
    selected: dict[int, Any] = {}
    attention_ids = {id(module) for module in attentions}
    for path, module in model.named_modules():
        if id(module) not in attention_ids:
            continue
        around = [owner for owner in owners if _within(path, owner)]
        # Any model around may make the masks: BridgeTower makes those of its text model itself.
        configs = [owners[owner].config for owner in around] + ([module.config] if dispatches(module) else [])
        selected |= {id(config): config for config in configs if config._attn_implementation in _REPLACEABLE}
        if around:
            module.__dict__["_sclkern_maps"] = requests[max(around, key=len)]
            undo.append(functools.partial(module.__dict__.pop, "_sclkern_maps", None))
    for path, owner in owners.items():
        inner = [request for other, request in requests.items() if _within(other, path)]
        handle = owner.register_forward_pre_hook(functools.partial(note_request, inner), with_kwargs=True)
        undo.append(handle.remove)
    copies: dict[int, Any] = {}
    for module in model.modules() if selected else ():
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            undo.append(functools.partial(setattr, module, "config", config))
            module.config = copy.deepcopy(config, copies)
    for config in selected.values():
        copies[id(config)]._attn_implementation_internal = IMPLEMENTATION


def _within(path: str, owner: str) -> bool:
    return not owner or path == owner or path.startswith(f"{owner}.")
