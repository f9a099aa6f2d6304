"""``TransformerEncoderLayer`` and ``TransformerEncoder``: torch's, on the fused ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.nn.linear_gelu import linear_gelu
from sclkern.nn.multihead_attention import MultiheadAttention
from sclkern.ops.dispatch import BACKENDS


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``, post-norm or ``norm_first``; its ``state_dict`` is torch's.

    Attention is ``MultiheadAttention`` of this package, a GELU is fused with the bias before it, and after a post-norm
    branch dropout, residual and LayerNorm are one kernel. A linear layer or norm that carries hooks, or was replaced by
    another module, is called as such. A layer made after the same ``torch.manual_seed`` has torch's weights.

    The attention under ``src_mask``, ``is_causal`` or a floating padding mask is torch's, and nested tensors are left
    to torch's forward. Otherwise its inference kernel, which takes a tanh GELU for the exact one and a floating padding
    mask for a bool one, is not used. Queries without a valid key and dropout are as in ``MultiheadAttention``.
    ``torch.nn.TransformerEncoder`` makes padding masks floating, ``TransformerEncoder`` of this package does not.

    Args:
        d_model, nhead, options: as in torch (``dim_feedforward``, ``dropout``, ``activation``, ``layer_norm_eps``,
            ``batch_first``, ``norm_first``, ``bias``, ``device``, ``dtype``, in this order).
        backend: "auto", "triton" or "eager"; it can be set later.
    """

    def __init__(self, d_model: int, nhead: int, *args, backend: str = "auto", **options) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
        super().__init__(d_model, nhead, *args, **options)
        # On "meta" no random number is drawn; the parameters are those that torch has made.
        made = self.self_attn
        self.self_attn = MultiheadAttention(
            d_model,
            nhead,
            dropout=made.dropout,
            bias=made.in_proj_bias is not None,
            batch_first=made.batch_first,
            device="meta",
            backend=backend,
        )
        self.self_attn.load_state_dict(made.state_dict(keep_vars=True), assign=True)

    @property
    def backend(self) -> str:
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
        """
        Args:
            src: (L, B, D), with ``batch_first`` (B, L, D), or (L, D).
            src_mask, is_causal: as in torch.
            src_key_padding_mask: (B, L), or (L,) beside (L, D); bool, True = ignore, or floating, to be added.

        Returns:
            Like src.

        Raises:
            As ``MultiheadAttention``.
        """
        if src.is_nested:
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
        if not (_is_plain(norm, nn.LayerNorm) and _is_plain(dropout, nn.Dropout)) or norm.bias is None:
            return norm(residual + dropout(update))
        return ops.dropout_add_layer_norm(
            update,
            residual,
            norm.weight,
            norm.bias,
            dropout_p=dropout.p if dropout.training else 0.0,
            eps=norm.eps,
            backend=self.backend,
        )


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder`` that hands a bool padding mask to its layers as it is; same ``state_dict``.

    Torch's adds 0 or -inf instead, which the fused attention cannot do. Padded rows of the output are undefined here,
    where torch's inference kernel gives zeros. With ``mask``, ``is_causal``, a floating padding mask or a nested tensor
    it is torch's own forward.

    Args:
        encoder_layer: a ``TransformerEncoderLayer``; it is copied. num_layers, norm: as in torch.
        enable_nested_tensor, mask_check: of torch's own forward; the first is off, because it costs the fused ops.
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
        """Shapes as in ``TransformerEncoderLayer``."""
        floating = src_key_padding_mask is not None and src_key_padding_mask.dtype != torch.bool
        if mask is not None or is_causal or floating or src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        for layer in self.layers:
            src = layer(src, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


def _gelu(activation) -> str | None:
    """The kind of ``ops.bias_gelu`` that ``activation`` is, or None."""
    if activation is F.gelu:
        return "none"
    return activation.approximate if _is_plain(activation, nn.GELU) else None


def _is_plain(module, kind: type) -> bool:
    """Whether calling the module does nothing beside what its class does, so that an op may stand for the call."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)
