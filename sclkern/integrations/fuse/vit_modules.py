"""Forwards of fused modules of vision transformers like timm's; ``vit`` finds them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.integrations.fuse import modules
from sclkern.integrations.fuse.modules import Fused, Gelu, bind, forced_backend, gelu_holds, kernels_run
from sclkern.integrations.fuse.structure import Attributes, changed, is_plain
from sclkern.integrations.huggingface.warn import warn_once
from sclkern.nn.linear_gelu import linear_gelu

# The argument with which BEiT's layers get a bias of the scores.
_SHARED = "shared_rel_pos_bias"


class ViTAttention(NamedTuple):
    """Settings of ``FusedViTAttention``.

    Attributes:
        names: arguments of the module's original forward, in order.
        heads: number of heads.
        attributes: plain attributes that the original forward reads, as they were.
    """

    names: tuple[str, ...]
    heads: int
    attributes: Attributes


class FusedViTAttention(Fused):
    """{qkv, attn_drop, proj, proj_drop}, with or without norms, gate, rotation, bias, projections of their own."""

    attn_drop: nn.Dropout
    proj: nn.Linear
    proj_drop: nn.Dropout
    _sclkern: ViTAttention

    def forward(self, *args, **options):
        """Attend with ``ops.attention``, or with the original forward where the op cannot compute this call."""
        settings = self._sclkern
        arguments = bind(settings.names, args, options)
        reason, bias = self._unsupported(arguments), None
        if reason is None and _SHARED in settings.names:
            bias = self._bias(arguments.get(_SHARED))
            reason = _bias_obstacle(bias, arguments[settings.names[0]], settings.heads)
        if reason is not None:
            if not modules._trial:
                warn_once(f"{reason}: computed by the original forward of {type(self).__name__}")
            return super().forward(*args, **options)
        x = arguments[settings.names[0]]
        gate: Any = getattr(self, "gate", None)
        query, key, value = self._heads(x, arguments.get("rope"))
        # Without torch's fused attention, the module itself calls its dropout.
        drops = self.training if getattr(self, "fused_attn", False) else self.attn_drop.training
        out: Any = ops.attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            bias=bias,
            dropout_p=self.attn_drop.p if drops else 0.0,
            backend=forced_backend(),
        )
        out = out.flatten(-2)
        if (norm := self._modules.get("norm")) is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _bias(self, shared: Tensor | None) -> Tensor | None:
        """BEiT's bias of the scores: its own, made by its own method, and one that its model shares among layers."""
        bias = shared
        if getattr(self, "relative_position_bias_table", None) is not None:
            make: Any = self._get_rel_pos_bias
            bias = make() if shared is None else make() + shared
        # timm's models share (H, L, L).
        return bias[(None,) * (4 - bias.ndim)] if isinstance(bias, Tensor) and bias.ndim < 4 else bias

    def _heads(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, H, L, D), which is how the module's norms and rotation read them."""
        children, heads = self._modules, (self._sclkern.heads, -1)
        if (packed := children.get("qkv")) is not None:
            query, key, value = self._packed(packed, x).unflatten(-1, (3, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            projections: tuple[Any, ...] = self.q_proj, self.k_proj, self.v_proj
            query, key, value = (projection(x).unflatten(-1, heads).transpose(1, 2) for projection in projections)
        if "q_norm" in children:
            norms: tuple[Any, ...] = self.q_norm, self.k_norm
            query, key = norms[0](query), norms[1](key)
        if rope is not None:
            query, key = (self._rotated(one, rope).type_as(value) for one in (query, key))
        return query, key, value

    def _packed(self, linear: Any, x: Tensor) -> Tensor:
        if getattr(self, "q_bias", None) is None:
            packed: Tensor = linear(x)
            return packed
        # EVA and BEiT keep the biases, of which that of the keys is zero, beside the layer.
        biases: tuple[Any, ...] = self.q_bias, self.k_bias, self.v_bias
        bias = torch.cat(biases)
        if getattr(self, "qkv_bias_separate", False):
            packed = linear(x)
            packed += bias
            return packed
        return F.linear(x, linear.weight, bias)

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """All but the first tokens, rotated by the function that the original forward calls."""
        rotate = self._original.forward.__globals__["apply_rot_embed_cat"]
        half = {"half": True} if getattr(self, "rotate_half", False) else {}
        count: Any = self.num_prefix_tokens
        return torch.cat([x[:, :, :count], rotate(x[:, :, count:], rope, **half)], 2)

    def _unsupported(self, arguments: dict[str, Any]) -> str | None:
        """The reason why the original forward must compute this call, or None."""
        settings = self._sclkern
        x = arguments.get(settings.names[0])
        if not isinstance(x, Tensor) or x.ndim != 3:
            return "an input that is not (B, L, W)"
        for name, argument in arguments.items():
            if name not in (settings.names[0], "rope", _SHARED) and argument is not None and argument is not False:
                return f"{name} is given"
        if (different := changed(self, settings.attributes)) is not None:
            return f"its {different} was changed"
        return None if is_plain(self.attn_drop, nn.Dropout) else "its attn_drop was changed"


def _bias_obstacle(bias: Tensor | None, x: Tensor, heads: int) -> str | None:
    """The reason why the op does not take a bias, or None."""
    if bias is None:
        return None
    batch, length = x.shape[:2]
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not isinstance(bias, Tensor) or bias.dtype not in (x.dtype, cast, torch.float32):
        return "a bias that is no tensor in the dtype of the input"
    if bias.ndim != 4 or bias.shape[0] not in (1, batch) or bias.shape[1] not in (1, heads):
        return "a bias that is not of shape (B or 1, H or 1, L, L)"
    return None if bias.shape[2:] == (length, length) else "a bias of another length"


class Mlp(NamedTuple):
    """Settings of ``FusedMlp``.

    Attributes:
        gelu: those of the linear layer and the GELU.
        rest: names of the modules after the GELU, in order.
    """

    gelu: Gelu
    rest: tuple[str, ...]

    @property
    def attributes(self) -> Attributes:
        """Plain attributes that the original forward reads, as they were."""
        return self.gelu.attributes


class FusedMlp(Fused):
    """{fc1, act, drop, fc2}, with one dropout or two, with or without a norm."""

    _sclkern: Mlp

    def forward(self, *args, **options):
        """Compute the bias and the GELU in one kernel; dropout, norm and second layer are the module's own."""
        gelu = self._sclkern.gelu
        inputs = bind(gelu.names, args, options)
        if len(inputs) != 1 or not gelu_holds(self, gelu) or changed(self, gelu.attributes):
            return super().forward(*args, **options)
        first, (x,) = getattr(self, gelu.first), inputs.values()
        if not kernels_run(x, first.weight):
            return super().forward(*args, **options)
        hidden = linear_gelu(x, first.weight, first.bias, gelu.kind, forced_backend())
        for name in self._sclkern.rest:
            hidden = getattr(self, name)(hidden)
        return hidden
