"""What ``sclkern.fuse`` does in models that use Hugging Face's attention interface."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from sclkern.integrations.huggingface.calls import call_of
from sclkern.integrations.huggingface.config import REPLACEABLE, is_view, view
from sclkern.integrations.huggingface.formulas import formula_of
from sclkern.integrations.huggingface.interface import BIAS
from sclkern.integrations.huggingface.maps import MapRequest, NoteRequest, find_collector
from sclkern.integrations.huggingface.packed import packs

_MASK_MAKERS = re.compile(r"\bcreate_\w*mask\w*|\bget_extended_attention_mask\b|\b_prepare_4d\w*mask\w*")
_CAUSAL_MAKERS = {"create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"}


def forward_names(module: nn.Module) -> set[str]:
    """The global names that the module's forward uses."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else {*code.co_names}


def dispatches(module: nn.Module) -> bool:
    """Whether the module takes its attention from ``transformers.AttentionInterface``."""
    return "ALL_ATTENTION_FUNCTIONS" in forward_names(module) and hasattr(module, "config")


def around(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that contain the one at a path.

    Args:
        model: the outermost.
        path: path of a module within it.

    Returns:
        They, the nearest first.
    """
    modules = [model]
    for name in path.split(".")[:-1]:
        modules.append(getattr(modules[-1], name))
    return modules[::-1] if path else []


def obstacle(module: Any, around: list[nn.Module]) -> str | None:
    """Why the attention of a module that ``dispatches`` is left.

    Args:
        module: the attention module.
        around: the modules that contain it, the nearest first.

    Returns:
        The reason; None where ``ops.attention`` computes its ordinary calls.
    """
    if is_view(module.config):
        return "fused already"
    implementation = module.config._attn_implementation
    if implementation not in REPLACEABLE:
        return f"its attention is {implementation!r} by choice"
    call, formula = call_of(type(module)), formula_of(type(module))  # type: ignore[arg-type]
    if call is None or not call.looked_up:
        return "its forward does more with the name of its attention than look it up"
    if formula.beyond is not None:
        return formula.beyond
    if not call.mask:
        return "its forward makes a mask of its own"
    for name in formula.extras:
        if name != BIAS and any(_value(module, source) is not None for source in call.keywords.get(name, ())):
            return f"{name} changes its scores"
    flags = [_value(module, source) for source in call.keywords.get("is_causal", ("self.is_causal",))]
    makers = _mask_makers(around)
    # Eager attention ignores the flag: BridgeTower's cross-modal layers have it, and no causal mask.
    ignored = implementation != "sdpa" and bool(makers) and not any("causal" in maker for maker in makers)
    if (True in flags and not ignored) or (makers and makers <= _CAUSAL_MAKERS):
        return "causal attention, which torch's attention computes"
    if formula.grouped and getattr(module, "num_key_value_groups", 1) != 1:
        return "several queries share a key, which torch's attention computes"
    return None


def computed(module: Any) -> tuple[str, str]:
    """What computes the attention of a module without an ``obstacle``.

    Args:
        module: the attention module.

    Returns:
        The op, and which calls it computes and what computes the others.
    """
    if packs(module):
        return "packed_attention", "all sequences at once; what the op does not take: one by one"
    call = call_of(type(module))  # type: ignore[arg-type]
    if call is not None and call.keywords.get(BIAS):
        return "attention", "calls with a padding mask or none, with a position bias; others: the model's own attention"
    return (
        "attention",
        "calls with a padding mask or none; other masks: torch's attention; maps: the model's own attention",
    )


def configure(model: nn.Module, attentions: list[nn.Module], undo: list[Callable[[], Any]]) -> None:
    """Select our attention in the modules that were fused, mark masks, and pass on requests for attention maps.

    Args:
        model: the model that is fused. Its configurations stay as they are, since other models may share them; modules
            get views of them.
        attentions: fused attention modules.
        undo: gets the steps that undo this, in the order in which they are made.
    """
    # Imported in a function: transformers is loaded already, see ``fuse``, and sclkern works without it.
    from transformers import PreTrainedModel

    find_collector()
    owners = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    requests = {path: MapRequest() for path in owners}
    fused = {id(module) for module in attentions}
    viewing: list[nn.Module] = []
    for path, module in model.named_modules():
        inside = [owner for owner in owners if _within(path, owner)]
        nearest = max(inside, key=len) if inside else None
        if id(module) in fused:
            if nearest is not None:
                module.__dict__["_sclkern_maps"] = requests[nearest]
            for name in ("_sclkern_maps", "_sclkern_wants_maps"):
                undo.append(functools.partial(module.__dict__.pop, name, None))
            # Any model around may make the masks: BridgeTower makes those of its text model itself.
            viewing += [owners[owner] for owner in inside if _only_makes_masks(type(owners[owner]))]
            viewing += [module] if dispatches(module) else []
        elif nearest is not None and dispatches(module):
            requests[nearest].complete = False
    for path, owner in owners.items():
        inner = [request for other, request in requests.items() if _within(other, path)]
        # The class that can be found by its name.
        cls = getattr(type(owner), "_original", type(owner))
        handle = owner.register_forward_pre_hook(NoteRequest(cls, inner), with_kwargs=True)
        undo.append(handle.remove)
    views: dict[tuple[int, bool], Any] = {}
    for viewer in {id(viewer): viewer for viewer in viewing}.values():
        config: Any = viewer.config
        if not is_view(config) and config._attn_implementation in REPLACEABLE:
            packing = id(viewer) in fused and packs(viewer)
            viewer.config = views.setdefault((id(config), packing), view(config, packing))
            undo.append(functools.partial(_restore, viewer, viewer.config, config))


def _restore(viewer: Any, seen: Any, config: Any) -> None:
    """Give a module its configuration back, unless it has got another one since."""
    if viewer.config is seen:
        viewer.config = config


def _within(path: str, owner: str) -> bool:
    return not owner or path == owner or path.startswith(f"{owner}.")


def _value(module: Any, source: str) -> Any:
    """The value of an argument of a call: a constant, or an attribute of the module; otherwise the source itself."""
    if source in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[source]
    name = source.removeprefix("self.")
    return getattr(module, name, None) if source.startswith("self.") and name.isidentifier() else source


def _mask_makers(modules: list[nn.Module]) -> set[str]:
    """What the nearest module that makes masks makes them with; CLIP's layers are not told."""
    for module in modules:
        makers = set(_MASK_MAKERS.findall("\n".join(_methods(type(module)))))  # type: ignore[arg-type]
        # A model of images that takes no mask gets none from the models around it, such as GIT's.
        if makers or (_takes_images(module) and "attention_mask" not in inspect.signature(module.forward).parameters):
            return makers
    return set()


def _takes_images(module: Any) -> bool:
    return getattr(module, "main_input_name", None) == "pixel_values"


def _only_makes_masks(cls: type) -> bool:
    """Whether a model uses the name of its attention for nothing but masks, after it was made."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("transformers.models.") or base is cls]
    return not any("_attn_implementation" in source for base in own for source in _methods(base))


@functools.cache
def _methods(cls: type) -> tuple[str, ...]:
    """The sources of the methods that a class itself has, without ``__init__``."""
    sources = []
    for name, method in vars(cls).items():
        if inspect.isfunction(method) and name != "__init__":
            try:
                sources.append(inspect.getsource(inspect.unwrap(method)))
            except (OSError, TypeError):
                continue
    return tuple(sources)
