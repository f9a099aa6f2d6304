"""Requests for attention maps: whether the model around a module was called with ``output_attentions=True``."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

# The part of transformers that collects maps by hooks while a model runs: what it collects now, or None. Set by
# ``find_collector``, because importing transformers takes seconds.
_collector: Any = None


@dataclass
class MapRequest:
    """Whether a model was last called with ``output_attentions=True``.

    The value stays until the next call, because gradient checkpointing repeats the forward during the backward.

    Attributes:
        wanted: whether attention maps are to be returned.
        complete: whether every attention of this model is fused. Without that, and where torch's attention computes the
            rest, which returns no maps, those of some layers would be taken for those of others.
    """

    wanted: bool = False
    complete: bool = True

    def __setstate__(self, state):
        # A copy that another process unpickles.
        self.__dict__.update(state)
        find_collector()


def find_collector() -> None:
    """Find the part of transformers that collects maps (5.2 and newer); it is imported already where models run."""
    global _collector
    try:
        _collector = importlib.import_module("transformers.utils.output_capturing")._active_collector
    except (ImportError, AttributeError):
        _collector = None


def wants_maps(module: nn.Module) -> bool:
    """Whether the model around ``module`` was called with ``output_attentions=True``."""
    request = module.__dict__.get("_sclkern_maps")
    if request is not None and request.wanted:
        return True
    # transformers 5.0 and 5.1 put a function that collects its outputs in the place of a module's forward.
    if _collector is None:
        return "forward" in module.__dict__
    collected = _collector.get()
    return collected is not None and any("attentions" in key for key in collected)


def maps_of(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether the attention interface must return attention maps.

    Args:
        module: the attention module.
        options: arguments of the interface.

    Returns:
        True where they are wanted, and the implementation that the model has chosen would return them, or every
        attention of the model is fused.
    """
    request, config = module.__dict__.get("_sclkern_maps"), getattr(module, "config", None)
    own = getattr(config, "_attn_implementation_internal", None)
    if own == "sdpa" and (request is None or not request.complete):
        return False
    return bool(options.get("output_attentions")) or wants_maps(module)


def note_request(requests: list[MapRequest], module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """A forward pre-hook of a model: note whether maps are wanted.

    Args:
        requests: what the attention modules of this model read.
        module: the model.
        args: positional arguments of its forward.
        options: keyword arguments of its forward.
    """
    wanted = options.get("output_attentions")
    if wanted is None and len(args) > 3:
        names = list(inspect.signature(type(module).forward).parameters)
        wanted = dict(zip(names[1:], args, strict=False)).get("output_attentions")
    if wanted is None:
        wanted = getattr(module.config, "output_attentions", False)
    for request in requests:
        request.wanted = bool(wanted)
