"""A model's configuration as fused modules see it: the attention implementation is ours, all else is the model's."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn

from sclkern.integrations.huggingface import packed
from sclkern.integrations.huggingface.interface import register_attention

IMPLEMENTATION = "sclkern"
# Attention implementations of Hugging Face that use torch, and that ours may stand for. None stands for "eager".
REPLACEABLE = ("eager", "sdpa", None)


class _View:
    """Mixin before a class of configurations. It shares the attributes of the configuration that it was made of."""

    __slots__ = ()
    _sclkern_name = IMPLEMENTATION
    _sclkern_plain: Any
    _attn_implementation_internal: str | None
    _output_attentions: bool

    @property
    def _attn_implementation(self):
        own = self._attn_implementation_internal
        return self._sclkern_name if own in REPLACEABLE else own

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        self._sclkern_plain._attn_implementation = value

    @property
    def output_attentions(self):
        """What the configuration says."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value):
        # The model's own implementation decides whether this is allowed.
        self._sclkern_plain.output_attentions = value

    def validate(self, *args, **options):
        """Check the configuration, which may depend on the model's own implementation."""
        return self._sclkern_plain.validate(*args, **options)

    def __eq__(self, other):
        return self._sclkern_plain == (other._sclkern_plain if is_view(other) else other)

    __hash__ = object.__hash__

    def __deepcopy__(self, memo):
        return view(copy.deepcopy(self._sclkern_plain, memo), isinstance(self, _PackedView))

    def __copy__(self):
        return copy.copy(self._sclkern_plain)

    def __reduce_ex__(self, protocol):
        return view, (self._sclkern_plain, isinstance(self, _PackedView))


class _PackedView(_View):
    """The same, for modules that pass packed sequences to an implementation whose name contains "flash"."""

    __slots__ = ()
    _sclkern_name = packed.NAME


def view(config: Any, packing: bool = False) -> Any:
    """A view of a configuration, in which attention is ours where the model's own is torch's.

    Args:
        config: a ``transformers.PreTrainedConfig``.
        packing: whether it is for a module that ``packs``.

    Returns:
        An object of a subclass of its class. Whatever is changed in one of the two changes in both.
    """
    register_attention(IMPLEMENTATION)
    if packing:
        packed.register_packed_attention()
    seen: Any = object.__new__(_view_class(type(config), _PackedView if packing else _View))  # type: ignore[arg-type]
    object.__setattr__(seen, "__dict__", config.__dict__)
    object.__setattr__(seen, "_sclkern_plain", config)
    return seen


def is_view(config: Any) -> bool:
    """Whether a configuration is a view."""
    return isinstance(config, _View)


def own_implementation(module: nn.Module) -> str | None:
    """The attention implementation that the model has, whatever a view says; "sclkern" where it was chosen by name."""
    implementation: str | None = getattr(getattr(module, "config", None), "_attn_implementation_internal", None)
    return implementation


@functools.cache
def _view_class(cls: type, mixin: type[_View]) -> type:
    def new(_view: type, *args: Any, **options: Any) -> Any:
        # transformers makes a configuration of its own class to see what differs from the defaults.
        return cls(*args, **options)

    # The class's own name, which Hugging Face saves and looks up.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    # A slot, because the view has the dictionary of another object. ``__init__``, because transformers would make one.
    more = {"__slots__": ("_sclkern_plain",), "__new__": new, "__init__": cls.__init__}  # type: ignore[misc]
    return type(cls.__name__, (mixin, cls), {**names, **more, "__eq__": _View.__eq__, "__hash__": _View.__hash__})
