"""What a fused module does: classes that stand before a module's own class, whose forward is what they fall back to."""

from __future__ import annotations

import copyreg
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.integrations.huggingface import key_padding, tell, wants_maps
from sclkern.nn.linear_gelu import linear_gelu
from sclkern.ops.dispatch import choose

# Arguments of a forward that change nothing in an attention without a cache.
_HARMLESS = ("cache_position", "num_items_in_batch", "output_hidden_states", "position_ids", "return_dict", "use_cache")


@dataclass
class Maps:
    """Whether the model was called with ``output_attentions=True``; it stays so until it is called again, because
    gradient checkpointing computes the forward again in the backward."""

    wanted: bool = False


class Fused:
    """Base of the classes below. ``_sclkern`` on the instance holds what its forward needs to know."""

    _sclkern: Any
    _original: type[nn.Module]

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}, fused" if own else "fused"

    def __reduce_ex__(self, protocol):
        # The class is made at run time; its parts can be found by name.
        state = super().__reduce_ex__(max(protocol, 2))[2:]
        return (_remake, (self._original, type(self).__mro__[1]), *state)


@functools.cache
def fused_class(original: type[nn.Module], mixin: type[Fused]) -> type[nn.Module]:
    """``original`` with the forward of ``mixin``, under its own name: Hugging Face saves and looks up names."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), {**names, "_original": original})


def _remake(original: type[nn.Module], mixin: type[Fused]) -> nn.Module:
    return copyreg.__newobj__(fused_class(original, mixin))


class FusedOutput(Fused):
    """{dense, LayerNorm, dropout}: LayerNorm(dropout(dense(x)) + residual), the end of a BERT block."""

    def forward(self, *args, **options):
        dense, norm, dropout = self.dense, self.LayerNorm, self.dropout
        plain = is_plain(dense, nn.Linear) and is_plain(norm, nn.LayerNorm) and is_plain(dropout, nn.Dropout)
        if not plain or options or len(args) != 2 or not kernels_run(*args, dense.weight):
            return super().forward(*args, **options)
        x, residual = args
        if torch.is_autocast_enabled(x.device.type) and x.device.type == "cuda":
            # As the LayerNorm of autocast gives.
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
    """``first`` and ``second`` are names of linear layers, ``second`` None where the module ends with the GELU."""

    first: str
    second: str | None
    kind: str


class FusedGelu(Fused):
    """{dense, intermediate_act_fn} or {fc1, activation_fn, fc2}: a linear layer, its GELU, and the next layer."""

    def forward(self, *args, **options):
        first = getattr(self, self._sclkern.first)
        if options or len(args) != 1 or not is_plain(first, nn.Linear) or not kernels_run(args[0], first.weight):
            return super().forward(*args, **options)
        hidden = linear_gelu(args[0], first.weight, first.bias, self._sclkern.kind, "auto")
        return hidden if self._sclkern.second is None else getattr(self, self._sclkern.second)(hidden)


class FusedBlock(Fused):
    """{attn, ln_1, mlp {c_fc, gelu, c_proj}, ln_2}: CLIP's block as OpenAI writes it, pre-norm, its own attention."""

    def forward(self, *args, **options):
        first = self.mlp.c_fc
        plain = is_plain(first, nn.Linear) and not options and 1 <= len(args) <= 2
        if not plain or not kernels_run(args[0], first.weight):
            return super().forward(*args, **options)
        x = args[0]
        x = x + self.attention(self.ln_1(x), *(args[1:] or (None,) * self._sclkern.needs_mask))
        hidden = linear_gelu(self.ln_2(x), first.weight, first.bias, self._sclkern.kind, "auto")
        return x + self.mlp.c_proj(hidden)


class Block(NamedTuple):
    """``needs_mask``: whether ``attention`` must be given a mask."""

    kind: str
    needs_mask: bool


class Attention(NamedTuple):
    """``names``: the arguments of the module's own forward. ``outputs``: how many it returns, maps not asked for; 0 for
    the output alone. ``heads``: their number."""

    names: tuple[str, ...]
    outputs: int
    heads: int


class _FusedAttention(Fused):
    def forward(self, *args, **options):
        given = {**dict(zip(self._sclkern.names, args, strict=False)), **options}
        hidden, mask = given.pop("hidden_states"), given.pop("attention_mask", None)
        context, context_mask = given.pop("encoder_hidden_states", None), given.pop("encoder_attention_mask", None)
        if context is not None:
            mask = context_mask
        reason = _left(self, given)
        if reason is None:
            padding, reason = key_padding(mask, hidden.shape[0], hidden.shape[1])
        if reason is not None:
            tell(f"{reason}: left to the forward of {type(self).__name__}")
            return super().forward(*args, **options)
        out = self._attend(hidden, context, padding)
        return (out, *(None,) * (self._sclkern.outputs - 1)) if self._sclkern.outputs else out

    def _attend(self, hidden: Tensor, context: Tensor | None, padding: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self._sclkern.heads, -1))


class FusedSelfAttention(_FusedAttention):
    """{query, key, value, dropout}: attention without an output projection, to itself or to a context."""

    def _attend(self, hidden, context, padding):
        context = hidden if context is None else context
        tensors = self._heads(self.query(hidden)), self._heads(self.key(context)), self._heads(self.value(context))
        dropout = self.dropout.p if self.dropout.training else 0.0
        return ops.attention(*tensors, key_padding_mask=padding, dropout_p=dropout).flatten(-2)


class FusedPackedAttention(_FusedAttention):
    """{qkv, projection, dropout}: self-attention whose projections are one layer."""

    def _attend(self, hidden, context, padding):
        tensors = self.qkv(hidden).unflatten(-1, (3, self._sclkern.heads, -1)).unbind(2)
        dropout = self.dropout.p if self.dropout.training else 0.0
        return self.projection(ops.attention(*tensors, key_padding_mask=padding, dropout_p=dropout).flatten(-2))


class FusedContrast(Fused):
    """CLIP's and BLIP's model with a contrast of images and texts: its loss by ``ops.completion_loss``."""

    def forward(self, *args, **options):
        as_tuple = options.get("return_dict", getattr(self.config, "return_dict", True)) is False
        if as_tuple or not options.get("return_loss"):
            return super().forward(*args, **options)
        out = super().forward(*args, **{**options, "return_loss": False})
        loss = ops.completion_loss(
            out.text_embeds, out.image_embeds, temperature=torch.exp(-self.logit_scale), gather=None
        )
        # Both directions are added there; here it is their mean.
        return type(out)(**{**out, "loss": loss / 2})


def _left(module: nn.Module, given: dict) -> str | None:
    """Why the module's own forward must compute this, or None. given: arguments beside states and masks."""
    if given.pop("output_attentions", False) or wants_maps(module):
        return "attention maps are asked for"
    if getattr(module, "save_attention", False):
        return "attention maps are to be kept"
    for name, argument in given.items():
        if argument is not None and argument is not False and name not in _HARMLESS:
            return f"{name} is given"
    return None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what its class ``kind`` does and nothing beside: no other class, no hooks."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks)


def kernels_run(*tensors: Tensor) -> bool:
    """Whether a kernel computes with these; else nothing is gained over the module's own forward."""
    return choose(*tensors).backend == "triton"
