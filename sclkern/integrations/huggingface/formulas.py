"""What the eager attention function of a Hugging Face module computes, known by its source.

Modeling files bring an ``eager_attention_forward`` of their own. Most compute what ``ops.attention`` computes; some add
a position bias, cap the scores or have attention sinks. ``known.json`` tells which, by the digest of the source.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from sclkern.integrations.source import known, source_digest

SECTION = "eager_attention_forward"
_EAGER = re.compile(r"\w*eager_attention_forward")


class Formula(NamedTuple):
    """The eager attention function of a class of modules, and what it computes.

    Attributes:
        function: the function; None where the class's forward has none.
        beyond: what it computes beyond softmax(query key^T * scale + mask) value, such as "attention sinks"; None where
            that is all.
        extras: its arguments that change the scores where they are not None, such as ``position_bias``.
        grouped: whether it repeats keys and values ``module.num_key_value_groups`` times.
        scale: "argument" (``scaling``, default 1 / sqrt(D)), "head_dim or argument" (default ``module.head_dim``) or
            "head_dim" (always).
        masked: whether it reads the attention mask.
        sliced: whether it takes as much of the mask as there are keys.
        place: module and name by which ``function`` can be found; None where it cannot.
    """

    function: Callable[..., Any] | None
    beyond: str | None
    extras: Sequence[str] = ()
    grouped: bool = False
    scale: str = "argument"
    masked: bool = True
    sliced: bool = False
    place: tuple[str, str] | None = None

    def find_function(self) -> Callable[..., Any] | None:
        """The eager attention function; None where there is none."""
        # torch.compile takes the formula as a constant, and traces no function that it holds.
        if torch.compiler.is_compiling() and self.place is not None:
            function: Callable[..., Any] = getattr(sys.modules[self.place[0]], self.place[1])
            return function
        return self.function

    def resolve_scale(self, module: Any, scaling: float | None) -> float | None:
        """The factor of the scores.

        Args:
            module: the attention module.
            scaling: argument of the interface.

        Returns:
            The factor; None = 1 / sqrt(D).
        """
        if self.scale == "head_dim" or (self.scale == "head_dim or argument" and scaling is None):
            factor: float = module.head_dim**-0.5
            return factor
        return scaling


_formulas: dict[type[nn.Module], Formula] = {}


def formula_of(cls: type[nn.Module]) -> Formula:
    """The formula of a class of attention modules; read once.

    Args:
        cls: class whose forward takes its attention from ``transformers.AttentionInterface``.

    Returns:
        The formula. ``beyond`` is set where it is not known.
    """
    return _read_constant(cls) if torch.compiler.is_compiling() else _read(cls)


def _read(cls: type[nn.Module]) -> Formula:
    if cls not in _formulas:
        _formulas[cls] = _examine(cls)
    return _formulas[cls]


# torch.compile takes what it returns as a constant, instead of tracing how sources are read.
_read_constant = torch.compiler.assume_constant_result(_read)


def _examine(cls: type[nn.Module]) -> Formula:
    forward = inspect.unwrap(cls.forward)
    code, names = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    found = [name for name in (code.co_names if code else ()) if _EAGER.fullmatch(name) and name in names]
    if len(found) != 1:
        return Formula(None, "an attention without an eager function that sclkern can find")
    function, module = names[found[0]], names.get("__name__", "")
    place = (module, found[0]) if getattr(sys.modules.get(module), found[0], None) is function else None
    entry = known(SECTION).get(source_digest(function) or "")
    if entry is None:
        return Formula(function, "an attention function that sclkern does not know", place=place)
    return Formula(function, **{"beyond": None, **entry["computes"]}, place=place)
