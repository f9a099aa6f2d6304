"""Forwards of fused modules: mixins placed before a module's own class, whose forward they fall back to."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from sclkern import ops
from sclkern.integrations.fuse.structure import Attributes, changed, is_plain, signature
from sclkern.integrations.huggingface.maps import wants_maps
from sclkern.integrations.huggingface.masks import key_padding
from sclkern.integrations.huggingface.warn import warn_once
from sclkern.nn.linear_gelu import linear_gelu
from sclkern.ops.dispatch import select_backend

# ``approximate`` of ``ops.bias_gelu``.
GeluKind = Literal["none", "tanh", "quick"]
# Arguments of an attention that the op takes.
OPERANDS = ("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask")
# Not empty while a trial compares a fused module with its original: the backend that the ops take.
_trial: list[str] = []


class Fused(nn.Module):
    """Base of the mixins below. ``_sclkern`` on an instance holds the settings that its forward needs."""

    _sclkern: Any
    _original: type[nn.Module]

    def extra_repr(self) -> str:
        """The original class's text, and "fused"."""
        text = super().extra_repr()
        return f"{text}, fused" if text else "fused"

    def __reduce_ex__(self, protocol):
        # The class is made at run time and cannot be found by its name, but its two bases can.
        state = super().__reduce_ex__(max(protocol, 2))[2:]
        return (_rebuild, (self._original, type(self).__mro__[1]), *state)


_classes: dict[tuple[type[nn.Module], type[Fused]], type[nn.Module]] = {}


def fused_class(original: type[nn.Module], mixin: type[Fused]) -> type[nn.Module]:
    """The subclass of ``original`` with the forward of ``mixin``; one class for each pair.

    Args:
        original: class of the module that is replaced. The subclass takes its name, which Hugging Face saves and looks
            up.
        mixin: one of the classes below.

    Returns:
        The subclass.
    """
    if (original, mixin) not in _classes:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        members = {**names, "_original": original, "forward": _signed(mixin.forward, original.forward)}
        _classes[original, mixin] = type(original.__name__, (mixin, original), members)
    return _classes[original, mixin]


def _signed(fused: Any, original: Any) -> Any:
    """A fused forward with the original's signature, by which transformers' Trainer chooses columns of a data set."""

    @functools.wraps(fused)
    def forward(self, *args, **options):
        # accelerate keeps a module's forward on the instance, beyond ``revert``.
        return (fused if isinstance(self, Fused) else original)(self, *args, **options)

    del forward.__wrapped__
    with contextlib.suppress(TypeError, ValueError):
        forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def _rebuild(original: type[nn.Module], mixin: type[Fused]) -> nn.Module:
    cls = fused_class(original, mixin)
    module: nn.Module = cls.__new__(cls)
    return module


class Swap(NamedTuple):
    """What replaces a module.

    Attributes:
        by: the replacement's name in the report.
        cls: class that the module gets.
        attributes: attributes that are set on it.
        children: child modules that must be replaced too, each with its swap.
        calls: which calls the replacement computes, and what computes the others.
        device: where it runs: "any", or "cuda" (elsewhere the module's own forward).
    """

    by: str
    cls: type[nn.Module]
    attributes: dict[str, Any]
    children: tuple[tuple[nn.Module, Swap], ...] = ()
    calls: str = "all calls"
    device: Literal["any", "cuda"] = "any"


# A rule's answer for a module: None (not of the kind), how to replace it, or the reason why it is left.
Verdict = Swap | str | None


class Output(NamedTuple):
    """Settings of ``FusedOutput``.

    Attributes:
        names: arguments of the module's original forward, in order.
        attributes: plain attributes that the original forward reads, as they were.
    """

    names: tuple[str, ...]
    attributes: Attributes


class FusedOutput(Fused):
    """{dense, LayerNorm, dropout}: LayerNorm(dropout(dense(x)) + residual), the end of a BERT block."""

    dense: nn.Linear
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout
    _sclkern: Output

    def forward(self, *args, **options):
        """Compute the sum and the norm in one kernel."""
        dense, norm, dropout = self.dense, self.LayerNorm, self.dropout
        plain = is_plain(dense, nn.Linear) and is_plain(norm, nn.LayerNorm) and is_plain(dropout, nn.Dropout)
        inputs = bind(self._sclkern.names, args, options)
        if not plain or len(inputs) != 2 or changed(self, self._sclkern.attributes):
            return super().forward(*args, **options)
        x, residual = inputs.values()
        if x.shape[:-1] != residual.shape[:-1] or not kernels_run(x, residual, dense.weight):
            return super().forward(*args, **options)
        if torch.is_autocast_enabled(x.device.type) and x.device.type == "cuda":
            # autocast computes LayerNorm in float32 and returns float32.
            residual = residual.float()
        return ops.dropout_add_layer_norm(
            F.linear(x, dense.weight),
            residual,
            norm.weight,
            norm.bias,
            x_bias=dense.bias,
            dropout_p=dropout.p if dropout.training else 0.0,
            eps=norm.eps,
            backend=forced_backend(),
        )


class Gelu(NamedTuple):
    """Settings of ``FusedGelu`` and ``FusedSequential``.

    Attributes:
        first: name of the linear layer before the GELU.
        gelu: name of the GELU.
        second: name of the linear layer after it; None where the module ends with the GELU.
        kind: which GELU, as ``approximate`` of ``ops.bias_gelu``.
        activation: what the GELU was, see ``structure.signature``.
        names: arguments of the module's original forward.
        attributes: plain attributes that the original forward reads, as they were.
    """

    first: str
    gelu: str
    second: str | None
    kind: GeluKind
    activation: Any
    names: tuple[str, ...] = ()
    attributes: Attributes = ()


class FusedGelu(Fused):
    """{dense, intermediate_act_fn} or {fc1, activation_fn, fc2}: a linear layer, its GELU, and the next layer."""

    _sclkern: Gelu

    def forward(self, *args, **options):
        """Compute bias and GELU in one kernel."""
        settings = self._sclkern
        inputs = bind(settings.names, args, options)
        if len(inputs) != 1 or not gelu_holds(self, settings) or changed(self, settings.attributes):
            return super().forward(*args, **options)
        first, (x,) = getattr(self, settings.first), inputs.values()
        if not kernels_run(x, first.weight):
            return super().forward(*args, **options)
        hidden = linear_gelu(x, first.weight, first.bias, settings.kind, forced_backend())
        return hidden if settings.second is None else getattr(self, settings.second)(hidden)


class FusedSequential(Fused):
    """``torch.nn.Sequential`` with a linear layer before a GELU."""

    _modules: dict[str, Any]
    # One for each GELU.
    _sclkern: tuple[Gelu, ...]

    def forward(self, input):
        """Compute bias and GELU in one kernel."""
        # A slice of it is of this class too, and has no settings.
        settings = {entry.first: entry for entry in self.__dict__.get("_sclkern", ())}
        x, done = input, None
        for name, following in itertools.pairwise([*self._modules, ""]):
            module = self._modules[name]
            entry = settings.get(name)
            if name == done:
                continue
            fusible = entry is not None and entry.gelu == following and gelu_holds(self, entry)
            if entry is not None and fusible and kernels_run(x, module.weight):
                x, done = linear_gelu(x, module.weight, module.bias, entry.kind, forced_backend()), following
            else:
                x = module(x)
        return x


class Attention(NamedTuple):
    """Settings of a fused attention.

    Attributes:
        names: arguments of the module's original forward, in order.
        outputs: length of the tuple that it returns without attention maps; 0 where it returns one tensor.
        heads: number of heads.
        harmless: arguments that do not change the result.
        defaults: defaults of the arguments that are not None.
        bool_mask: whether it reads a mask of bool as True = attend.
        context_mask: name of the mask that belongs to ``encoder_hidden_states``.
        attributes: plain attributes that the original forward reads, as they were.
    """

    names: tuple[str, ...]
    outputs: int
    heads: int
    harmless: frozenset[str] = frozenset()
    defaults: tuple[tuple[str, Any], ...] = ()
    bool_mask: bool = False
    context_mask: str = "encoder_attention_mask"
    attributes: Attributes = ()


class _FusedAttention(Fused):
    _sclkern: Attention
    dropout: nn.Dropout

    def forward(self, *args, **options):
        """Attend with ``ops.attention``, or with the original forward where the op cannot compute this call."""
        arguments = bind(self._sclkern.names, args, options)
        reason = _unsupported(self, arguments)
        padding = None
        if reason is None:
            hidden, context = arguments["hidden_states"], arguments.get("encoder_hidden_states")
            mask = arguments.get("attention_mask" if context is None else self._sclkern.context_mask)
            keys = (hidden if context is None else context).shape[1]
            if mask is not None and (mask.ndim != 4 or mask.shape[-1] != keys):
                reason = f"a mask of shape {tuple(mask.shape)}"
            elif mask is not None and not mask.is_floating_point() and not self._sclkern.bool_mask:
                reason = f"a mask of {str(mask.dtype).removeprefix('torch.')}"
            else:
                padding, reason = key_padding(mask, hidden.shape[0], hidden.shape[1])
        if reason is not None:
            if not _trial:
                warn_once(f"{reason}: computed by the original forward of {type(self).__name__}")
            return super().forward(*args, **options)
        out = self._attend(hidden, context, padding)
        return (out, *(None,) * (self._sclkern.outputs - 1)) if self._sclkern.outputs else out

    def _attend(self, hidden: Tensor, context: Tensor | None, padding: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        dropout = self.dropout.p if self.dropout.training else 0.0
        out: Any = ops.attention(
            query, key, value, key_padding_mask=padding, dropout_p=dropout, backend=forced_backend()
        )
        merged: Tensor = out.flatten(-2)
        return merged


class FusedSelfAttention(_FusedAttention):
    """{query, key, value, dropout}: self- or cross-attention without an output projection."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    def _attend(self, hidden, context, padding):
        context = hidden if context is None else context
        heads = (self._sclkern.heads, -1)
        query = self.query(hidden).unflatten(-1, heads)
        key, value = self.key(context).unflatten(-1, heads), self.value(context).unflatten(-1, heads)
        return self._attention(query, key, value, padding)


class FusedPackedAttention(_FusedAttention):
    """{qkv, projection, dropout}: self-attention whose three projections are one layer."""

    qkv: nn.Linear
    projection: nn.Linear

    def _attend(self, hidden, context, padding):
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self._sclkern.heads, -1)).unbind(2)
        return self.projection(self._attention(query, key, value, padding))


def bind(names: tuple[str, ...], args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; empty if there are more than names, or one is given twice.

    Args:
        names: arguments of the forward, in order.
        args: of the call.
        options: of the call.

    Returns:
        Values by name.
    """
    given = dict(zip(names, args, strict=False))
    # By length, which torch.compile can trace.
    bound = {**given, **options}
    return bound if len(args) <= len(names) and len(bound) == len(given) + len(options) else {}


def _unsupported(module: Any, arguments: dict[str, Any]) -> str | None:
    """The reason why the original forward must compute this call, or None.

    Args:
        module: the attention.
        arguments: what it was called with.

    Returns:
        The reason, such as "head_mask is given".
    """
    settings: Attention = module._sclkern
    hidden, context = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or (context is not None and context.ndim != 3):
        return "hidden states that are not (B, L, W)"
    if context is not None and context.shape[0] != hidden.shape[0]:
        return "a context of another batch"
    if wants_maps(module, arguments):
        return "attention maps are requested"
    if getattr(module, "save_attention", False):
        return "attention maps are to be saved"
    if (name := changed(module, settings.attributes)) is not None:
        return f"its {name} was changed"
    if not is_plain(module.dropout, nn.Dropout):
        return "its dropout was changed"
    defaults = dict(settings.defaults)
    for name, argument in arguments.items():
        known = name in OPERANDS or name in settings.harmless or name == "output_attentions"
        if not known and argument is not defaults.get(name):
            return f"{name} is given"
    return None


def gelu_holds(module: nn.Module, settings: Gelu) -> bool:
    """Whether the layers around the GELU, and the GELU, are what they were when they were fused."""
    first = getattr(module, settings.first)
    if not is_plain(first, nn.Linear) or first.bias is None:
        return False
    gelu = getattr(module, settings.gelu)
    if isinstance(gelu, nn.Module) and not is_plain(gelu, type(gelu)):
        return False
    return bool(signature(gelu) == settings.activation)


def kernels_run(*tensors: Tensor) -> bool:
    """Whether a kernel would run for these tensors; without one, the original forward is as fast."""
    if any(type(tensor) not in (Tensor, nn.Parameter, FakeTensor) for tensor in tensors):
        # A class of tensors with products of its own, such as quantised weights.
        return False
    return bool(_trial) or select_backend(*tensors).backend == "triton"


def forced_backend() -> str:
    """The ``backend`` of the ops: "auto", except in a trial."""
    return _trial[-1] if _trial else "auto"


@contextlib.contextmanager
def ops_forced(backend: str) -> Iterator[None]:
    """Let fused modules compute with their ops wherever the calls allow it, kernels or not.

    Args:
        backend: of the ops.

    Yields:
        Nothing.
    """
    _trial.append(backend)
    try:
        yield
    finally:
        _trial.pop()
