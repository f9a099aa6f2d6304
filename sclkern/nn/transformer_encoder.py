"""``TransformerEncoderLayer`` and ``TransformerEncoder``: torch's modules, on the fused ops."""

from __future__ import annotations

from typing import Any, Literal, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.nn.linear_gelu import linear_gelu
from sclkern.nn.multihead_attention import MultiheadAttention
from sclkern.ops.dispatch import BACKENDS
from sclkern.random import one_seed_draw

_Module = TypeVar("_Module", bound=nn.Module)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``, post-norm or ``norm_first``; its ``state_dict`` is torch's.

    Attention is this package's ``MultiheadAttention``; a GELU is fused with the bias before it; after a post-norm
    branch dropout, residual and LayerNorm are one kernel. A linear layer, dropout or norm that carries hooks or was
    replaced by another module is called as it is. After the same ``torch.manual_seed`` the weights are torch's.

    Attention with ``src_mask``, ``is_causal`` or a floating padding mask is torch's; nested tensors use its forward.
    Torch's inference kernel is not used: it computes the tanh GELU as the exact one and reads a floating padding mask
    as bool. Queries without a valid key and dropout are as in ``MultiheadAttention``. ``torch.nn.TransformerEncoder``
    makes padding masks floating, this package's ``TransformerEncoder`` does not.

    Args:
        d_model: D, channels.
        nhead: number of heads.
        *args: as in torch: ``dim_feedforward``, ``dropout``, ``activation``, ``layer_norm_eps``, ``batch_first``,
            ``norm_first``, ``bias``, ``device``, ``dtype``, in this order.
        backend: "auto", "triton" or "eager"; it can be set later.
        **options: the same arguments by name.

    Attributes:
        self_attn: the attention.

    Raises:
        ValueError: unknown backend.
    """

    self_attn: MultiheadAttention

    def __init__(self, d_model: int, nhead: int, *args: Any, backend: str = "auto", **options: Any) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
        super().__init__(d_model, nhead, *args, **options)
        # Modules on "meta" draw no random numbers; the parameters are those torch initialized.
        initialized = self.self_attn
        self.self_attn = MultiheadAttention(
            d_model,
            nhead,
            dropout=initialized.dropout,
            bias=initialized.in_proj_bias is not None,
            batch_first=initialized.batch_first,
            device="meta",
            backend=backend,
        )
        self.self_attn.load_state_dict(initialized.state_dict(keep_vars=True), assign=True)

    @property
    def backend(self) -> str:
        """Backend of the fused ops."""
        return self.self_attn.backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self.self_attn.backend = backend

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run the layer.

        Args:
            src: (L, B, D), with ``batch_first`` (B, L, D), or (L, D).
            src_mask: as in torch.
            src_key_padding_mask: (B, L), or (L,) for an unbatched src; bool, True = ignore, or floating, which torch
                adds to the scores.
            is_causal: as in torch.

        Returns:
            Like src.

        Raises:
            TypeError: as in ``MultiheadAttention``.
            ValueError: as in ``MultiheadAttention``.
        """
        replaced = "_sa_block" in self.__dict__ or "_ff_block" in self.__dict__
        if src.is_nested or replaced:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return src + self._ff_block(self.norm2(src))
        update, _ = self.self_attn(
            src, src, src, src_key_padding_mask, need_weights=False, attn_mask=src_mask, is_causal=is_causal
        )
        src = self._add_norm(update, src, self.dropout1, self.norm1)
        return self._add_norm(self._feed_forward(src), src, self.dropout2, self.norm2)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        gelu = _gelu(self.activation)
        if gelu is not None and _is_plain(self.linear1, nn.Linear):
            hidden = linear_gelu(x, self.linear1.weight, self.linear1.bias, gelu, self.backend)
        else:
            hidden = self.activation(self.linear1(x))
        return self.linear2(self.dropout(hidden))

    def _add_norm(self, update: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module) -> Tensor:
        if _is_plain(norm, nn.LayerNorm) and _is_plain(dropout, nn.Dropout) and norm.bias is not None:
            out = ops.dropout_add_layer_norm(
                update,
                residual,
                norm.weight,
                norm.bias,
                dropout_p=dropout.p if dropout.training else 0.0,
                eps=norm.eps,
                backend=self.backend,
            )
            return cast(Tensor, out)
        return norm(residual + dropout(update))


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder`` that passes a bool padding mask to its layers unchanged; same ``state_dict``.

    Torch's encoder turns it into an additive mask of 0 and -inf, which the fused attention does not support. Padded
    rows of the output are undefined here; torch's inference kernel writes zeros. With ``mask``, ``is_causal``, a
    floating padding mask, a nested tensor, or a layer of another class this is torch's own forward.

    Args:
        encoder_layer: a ``TransformerEncoderLayer``, which is copied.
        num_layers: number of layers.
        norm: as in torch.
        enable_nested_tensor: as in torch, for its own forward; off by default, because it bypasses the fused ops.
        mask_check: as in torch, for its own forward.
    """

    def __init__(
        self,
        encoder_layer: TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = False,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Run the layers and the norm.

        Args:
            src: as in ``TransformerEncoderLayer``.
            mask: as in torch.
            src_key_padding_mask: as in ``TransformerEncoderLayer``.
            is_causal: as in torch.

        Returns:
            Like src.
        """
        floating = src_key_padding_mask is not None and src_key_padding_mask.dtype != torch.bool
        # A layer of somebody else may read a mask of bool in another way than the additive one that torch makes of it.
        own = all(type(layer) in (TransformerEncoderLayer, nn.TransformerEncoderLayer) for layer in self.layers)
        if mask is not None or is_causal or floating or src.is_nested or not own:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        with one_seed_draw():
            for layer in self.layers:
                src = layer(src, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


def _gelu(activation: Any) -> Literal["none", "tanh"] | None:
    """The ``approximate`` of ``ops.bias_gelu`` that computes ``activation``, or None."""
    if activation is F.gelu:
        return "none"
    return cast(Literal["none", "tanh"], activation.approximate) if _is_plain(activation, nn.GELU) else None


def _is_plain(module: Any, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether calling ``module`` only does what ``kind`` does, so that an op may replace the call."""
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
        return False
    return "forward" not in module.__dict__
