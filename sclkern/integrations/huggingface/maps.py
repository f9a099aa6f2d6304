"""Requests for attention maps: which part of a model was called with ``output_attentions=True``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class MapRequest:
    """Whether a model was last called with ``output_attentions=True``.

    The value stays until the next call, because gradient checkpointing repeats the forward during the backward.

    Attributes:
        wanted: whether attention maps are to be returned.
    """

    wanted: bool = False


def wants_maps(module: nn.Module) -> bool:
    """Whether the model around ``module`` was called with ``output_attentions=True`` (known after ``sclkern.fuse``)."""
    request = module.__dict__.get("_sclkern_maps")
    return request is not None and request.wanted


def note_request(requests: list[MapRequest], module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    wanted = options.get("output_attentions")
    if wanted is None:
        wanted = getattr(module.config, "output_attentions", False)
    for request in requests:
        request.wanted = bool(wanted)
