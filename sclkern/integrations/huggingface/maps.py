"""Requests for attention maps: whether the model around a module was called with ``output_attentions=True``.

Most models of transformers collect maps by hooks, and a collector says whether they do. Some collect by hand what their
layers return (BridgeTower): the request does not reach the attention then, and is read from the calls around it.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import nn

# The part of transformers that collects maps by hooks while a model runs: what it collects now, or None. It and the
# class of all models are set by ``find_collector``, because importing transformers takes seconds.
_collector: Any = None
_model_class: Any = None


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


@dataclass
class NoteRequest:
    """A forward pre-hook of a model: note whether maps are wanted.

    Attributes:
        model: class of the model.
        requests: what the attention modules of this model read.
    """

    model: type[nn.Module]
    requests: list[MapRequest]

    def __call__(self, module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note the request of a call.

        Args:
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
        for request in self.requests:
            request.wanted = bool(wanted)

    def __setstate__(self, state):
        # A copy that another process unpickles.
        self.__dict__.update(state)
        find_collector()
        _register_recorded(self.model)


def find_collector() -> None:
    """Find the part of transformers that collects maps (5.2 and newer); it is imported already where models run."""
    global _collector, _model_class
    _model_class = importlib.import_module("transformers.modeling_utils").PreTrainedModel
    try:
        _collector = importlib.import_module("transformers.utils.output_capturing")._active_collector
    except (ImportError, AttributeError):
        _collector = None


def _register_recorded(cls: Any) -> None:
    """Tell transformers which outputs a class of models records: it learns that only from models that are made."""
    for name in ("transformers.utils.output_capturing", "transformers.utils.generic"):
        registry = getattr(sys.modules.get(name), "_CAN_RECORD_REGISTRY", None)
        if registry is not None:
            # Newest, its ``__setitem__`` takes a model and keeps the name of its class.
            dict.setdefault(registry, str(cls), getattr(cls, "_can_record_outputs", None))


def wants_maps(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether the model around a module was called with ``output_attentions=True``.

    Args:
        module: an attention module.
        arguments: what it, or its attention function, was called with, by name.

    Returns:
        The request of this call; where gradient checkpointing repeats a call, that of the call.
    """
    request = module.__dict__.get("_sclkern_maps")
    if arguments.get("output_attentions") or (request is not None and request.wanted):
        return True
    wanted = _collects(module)
    if torch.compiler.is_compiling():
        return bool(wanted)
    seen: bool = module.__dict__.get("_sclkern_wants_maps", False)
    if wanted is None and torch._C._current_graph_task_id() != -1:
        # In a backward, gradient checkpointing repeats the call.
        return seen
    if wanted is None:
        wanted = "output_attentions" not in arguments and _asked_by_callers()
    if wanted != seen and request is None:
        module.__dict__["_sclkern_wants_maps"] = wanted
    return wanted


def maps_of(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether the attention interface must return attention maps.

    Args:
        module: the attention module.
        options: arguments of the interface.

    Returns:
        True where they are wanted, and the implementation that the model has chosen would return them, or every
        attention of the model is fused; also where torch.compile hides whether they are wanted.
    """
    request, config = module.__dict__.get("_sclkern_maps"), getattr(module, "config", None)
    own = getattr(config, "_attn_implementation_internal", None)
    if own == "sdpa" and (request is None or not request.complete):
        return False
    if wants_maps(module, options):
        return True
    # Models that ``fuse`` changed have hooks that tell; here, nobody looks at the callers.
    hidden = torch.compiler.is_compiling() and request is None and own not in ("eager", "sdpa", None)
    return hidden and "output_attentions" not in options and _collects(module) is None


def _collects(module: nn.Module) -> bool | None:
    """Whether transformers collects maps by hooks in this call; None where it collects nothing by them."""
    if _collector is None:
        # transformers 5.0 and 5.1 put a function that collects its outputs in the place of a module's forward, and the
        # method again after the call.
        return True if isinstance(module.__dict__.get("forward"), FunctionType) else None
    collected = _collector.get()
    return None if collected is None else any("attentions" in key for key in collected)


def _asked_by_callers() -> bool:
    """Whether a module was called with ``output_attentions=True`` around this call."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and (code.co_name == "forward" or code.co_name.startswith("get_")):
            module = frame.f_locals.get(code.co_varnames[0])
            if isinstance(module, nn.Module) and _asked(frame, module):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _asked(frame: FrameType, module: Any) -> bool:
    """Whether a call of a method asks for maps; of a model, also its configuration."""
    names, code = frame.f_locals, frame.f_code
    wanted = names.get("output_attentions")
    if wanted is None and code.co_flags & inspect.CO_VARKEYWORDS:
        place = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
        wanted = (names.get(code.co_varnames[place]) or {}).get("output_attentions")
    if wanted is None and isinstance(module, _model_class or ()):
        wanted = getattr(module.config, "output_attentions", False)
    return wanted is True
