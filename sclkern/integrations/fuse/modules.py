"""Forwards of fused modules: mixins placed before a module's own class, whose forward they fall back to."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.integrations.huggingface.maps import wants_maps
from sclkern.integrations.huggingface.masks import key_padding
from sclkern.integrations.huggingface.warn import warn_once
from sclkern.nn.linear_gelu import linear_gelu
from sclkern.ops.dispatch import select_backend

# ``approximate`` of ``ops.bias_gelu``.
GeluKind = Literal["none", "tanh", "quick"]
# Arguments of a forward that do not change the result of an attention without a cache.
_HARMLESS = ("cache_position", "num_items_in_batch", "output_hidden_states", "position_ids", "return_dict", "use_cache")


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
        _classes[original, mixin] = type(original.__name__, (mixin, original), {**names, "_original": original})
    return _classes[original, mixin]


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
    """

    by: str
    cls: type[nn.Module]
    attributes: dict[str, Any]
    children: tuple[tuple[nn.Module, Swap], ...] = ()


# A rule's answer for a module: None (not of the kind), how to replace it, or the reason why it is left.
Verdict = Swap | str | None


class FusedOutput(Fused):
    """{dense, LayerNorm, dropout}: LayerNorm(dropout(dense(x)) + residual), the end of a BERT block."""

    dense: nn.Linear
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout

    def forward(self, *args, **options):
        """Compute the sum and the norm in one kernel."""
        dense, norm, dropout = self.dense, self.LayerNorm, self.dropout
        plain = is_plain(dense, nn.Linear) and is_plain(norm, nn.LayerNorm) and is_plain(dropout, nn.Dropout)
        if not plain or options or len(args) != 2 or not kernels_run(*args, dense.weight):
            return super().forward(*args, **options)
        x, residual = args
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
        )


class Gelu(NamedTuple):
    """Settings of ``FusedGelu``.

    Attributes:
        first: name of the linear layer before the GELU.
        second: name of the linear layer after it; None where the module ends with the GELU.
        kind: which GELU, as ``approximate`` of ``ops.bias_gelu``.
    """

    first: str
    second: str | None
    kind: GeluKind


class FusedGelu(Fused):
    """{dense, intermediate_act_fn} or {fc1, activation_fn, fc2}: a linear layer, its GELU, and the next layer."""

    _sclkern: Gelu

    def forward(self, *args, **options):
        """Compute bias and GELU in one kernel."""
        first = getattr(self, self._sclkern.first)
        if options or len(args) != 1 or not is_plain(first, nn.Linear) or not kernels_run(args[0], first.weight):
            return super().forward(*args, **options)
        hidden = linear_gelu(args[0], first.weight, first.bias, self._sclkern.kind, "auto")
        return hidden if self._sclkern.second is None else getattr(self, self._sclkern.second)(hidden)


class Block(NamedTuple):
    """Settings of ``FusedBlock``.

    Attributes:
        kind: which GELU, as ``approximate`` of ``ops.bias_gelu``.
        needs_mask: whether the block's ``attention`` requires a mask argument.
    """

    kind: GeluKind
    needs_mask: bool


class FusedBlock(Fused):
    """{attn, ln_1, mlp {c_fc, gelu, c_proj}, ln_2}: CLIP's pre-norm block as OpenAI writes it, its attention kept."""

    _sclkern: Block
    attention: Any
    ln_1: nn.Module
    ln_2: nn.Module
    mlp: Any

    def forward(self, *args, **options):
        """Compute bias and GELU of the MLP in one kernel."""
        first = self.mlp.c_fc
        plain = is_plain(first, nn.Linear) and not options and 1 <= len(args) <= 2
        if not plain or not kernels_run(args[0], first.weight):
            return super().forward(*args, **options)
        x = args[0]
        x = x + self.attention(self.ln_1(x), *(args[1:] or (None,) * self._sclkern.needs_mask))
        hidden = linear_gelu(self.ln_2(x), first.weight, first.bias, self._sclkern.kind, "auto")
        return x + self.mlp.c_proj(hidden)


class Attention(NamedTuple):
    """Settings of a fused attention.

    Attributes:
        names: arguments of the module's original forward, in order.
        outputs: length of the tuple that it returns without attention maps; 0 where it returns one tensor.
        heads: number of heads.
    """

    names: tuple[str, ...]
    outputs: int
    heads: int


class _FusedAttention(Fused):
    _sclkern: Attention
    dropout: nn.Dropout

    def forward(self, *args, **options):
        """Attend with ``ops.attention``, or with the original forward where the op cannot compute this call."""
        arguments = {**dict(zip(self._sclkern.names, args, strict=False)), **options}
        hidden, mask = arguments.pop("hidden_states"), arguments.pop("attention_mask", None)
        context = arguments.pop("encoder_hidden_states", None)
        context_mask = arguments.pop("encoder_attention_mask", None)
        if context is not None:
            mask = context_mask
        reason = _unsupported(self, arguments)
        if reason is None:
            padding, reason = key_padding(mask, hidden.shape[0], hidden.shape[1])
        if reason is not None:
            warn_once(f"{reason}: computed by the original forward of {type(self).__name__}")
            return super().forward(*args, **options)
        out = self._attend(hidden, context, padding)
        return (out, *(None,) * (self._sclkern.outputs - 1)) if self._sclkern.outputs else out

    def _attend(self, hidden: Tensor, context: Tensor | None, padding: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        dropout = self.dropout.p if self.dropout.training else 0.0
        out: Any = ops.attention(query, key, value, key_padding_mask=padding, dropout_p=dropout)
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


def _unsupported(module: nn.Module, arguments: dict[str, Any]) -> str | None:
    """The reason why the original forward must compute this call, or None.

    Args:
        module: the attention.
        arguments: what it was called with, except hidden states and masks.

    Returns:
        The reason, such as "head_mask is given".
    """
    if arguments.pop("output_attentions", False) or wants_maps(module):
        return "attention maps are requested"
    if getattr(module, "save_attention", False):
        return "attention maps are to be saved"
    for name, argument in arguments.items():
        if argument is not None and argument is not False and name not in _HARMLESS:
            return f"{name} is given"
    return None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does exactly what its class ``kind`` does: no subclass, no hooks."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks)


def kernels_run(*tensors: Tensor) -> bool:
    """Whether a kernel would run for these tensors; without one, the original forward is as fast."""
    return select_backend(*tensors).backend == "triton"
