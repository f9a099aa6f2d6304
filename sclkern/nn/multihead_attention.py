"""``MultiheadAttention``: torch's module, on the fused attention wherever that computes the same."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.ops.dispatch import BACKENDS


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` that stores no scores and no probabilities; its ``state_dict`` is torch's.

    Self-attention and attention to separate keys and values use ``sclkern.ops.attention``; cross-attention (key and
    value are one tensor, with biases) uses ``sclkern.ops.cross_attention``, which multiplies less where one side is
    short. Torch's own forward computes the rest, and ``explain`` says so: attention maps (torch's default, so pass
    ``need_weights=False``), an attention mask, a causal hint, an additive padding mask, ``add_bias_kv``,
    ``add_zero_attn``, nested tensors.

    Differences from torch: a query whose keys are all padding gets ``out_proj.bias`` (the projection of zeros) and has
    zero gradients, where torch gives NaN. The same seed of torch's generator may drop other probabilities, and the
    kernels round ``dropout`` to a multiple of 1 / 65536.

    Args:
        embed_dim: E, channels of queries and outputs.
        num_heads: H, which divides E.
        *args: as in torch: ``dropout``, ``bias``, ``add_bias_kv``, ``add_zero_attn``, ``kdim``, ``vdim``,
            ``batch_first``, ``device``, ``dtype``, in this order.
        backend: "auto", "triton" or "eager", of the fused ops; torch's forward ignores it.
        **options: the same arguments by name.

    Raises:
        ValueError: unknown backend.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *args: Any,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
        super().__init__(embed_dim, num_heads, *args, **options)
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        dropout_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` to ``key`` and ``value``, between their projections and the output projection.

        Args:
            query: (Lq, B, E), with ``batch_first`` (B, Lq, E), or (Lq, E); E is ``embed_dim``.
            key: (Lk, B, kdim), with ``batch_first`` (B, Lk, kdim), or (Lk, kdim).
            value: like key, with vdim channels.
            key_padding_mask: (B, Lk), or (Lk,) for unbatched keys; bool, True = ignore, or floating, which torch adds
                to the scores.
            need_weights: return attention maps, computed by torch.
            attn_mask: as in torch, computed by torch.
            average_attn_weights: as in torch, for the attention maps.
            is_causal: as in torch, computed by torch.
            dropout_ids: (B,) int64, which key the dropout masks in place of the samples' indices; not where torch
                computes.

        Returns:
            Output like query, and None or, with ``need_weights``, torch's attention maps.

        Raises:
            TypeError: the padding mask is neither bool nor floating.
            ValueError: wrong shape, ``backend="triton"`` where no kernel can run, or ``dropout_ids`` where torch
                computes. Torch's forward raises its own.
        """
        why = self._needs_torch(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if why is not None:
            if dropout_ids is not None:
                raise ValueError(f"dropout_ids: torch computes this, because {why}, and its dropout takes no ids")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value, key_padding_mask)
        op, tensors, options = self._op_call(query, key, value, key_padding_mask)
        options["dropout_ids"] = dropout_ids
        if op == "cross_attention":
            # torch's result is contiguous in its own layout.
            return self._from_batch_first(ops.cross_attention(*tensors, **options), query).contiguous(), None
        out = cast(Tensor, ops.attention(*tensors, **options))
        out = self._from_batch_first(out.flatten(-2), query)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None

    def explain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> str:
        """Explain which implementation ``forward`` uses for the same arguments.

        Args:
            query: as in ``forward``.
            key: as in ``forward``.
            value: as in ``forward``.
            key_padding_mask: as in ``forward``.
            need_weights: as in ``forward``.
            attn_mask: as in ``forward``.
            average_attn_weights: as in ``forward``.
            is_causal: as in ``forward``.

        Returns:
            "triton: ...", "eager: ..." or "torch: ...", with the reasons.
        """
        reason = self._needs_torch(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if reason is not None:
            return f"torch: {reason}"
        self._check(query, key, value, key_padding_mask)
        with torch.no_grad():
            op, tensors, options = self._op_call(query, key, value, key_padding_mask)
        return str(ops.explain(op, *tensors, **options))

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}, backend={self.backend!r}"
        )

    def _needs_torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> str | None:
        """Why torch computes this, or None."""
        if need_weights:
            return "need_weights requests attention maps"
        if attn_mask is not None:
            return "attn_mask is given"
        if is_causal:
            return "is_causal requests a causal mask"
        if key_padding_mask is not None and key_padding_mask.is_floating_point():
            return "key_padding_mask is floating and is added to the scores"
        if self.bias_k is not None:
            return "add_bias_kv adds a key and a value"
        if self.add_zero_attn:
            return "add_zero_attn adds a key and a value"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensors"
        return None

    def _check(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> None:
        if query.ndim not in (2, 3) or query.shape[-1] != self.embed_dim:
            layout = "(B, Lq, E)" if self.batch_first else "(Lq, B, E)"
            raise ValueError(
                f"query: got shape {tuple(query.shape)}, expected {layout} or (Lq, E) with E = {self.embed_dim}"
            )
        length_dim = 1 if self.batch_first and query.ndim == 3 else 0
        keys = key.shape[length_dim] if key.ndim == query.ndim else -1
        for name, tensor, width in (("key", key, self.kdim), ("value", value, self.vdim)):
            expected = [*query.shape[:-1], width]
            expected[length_dim] = keys
            if list(tensor.shape) != expected:
                shown = ", ".join("Lk" if i == length_dim else str(size) for i, size in enumerate(expected))
                raise ValueError(
                    f"{name}: got shape {tuple(tensor.shape)}, expected ({shown}), the same Lk for key and value, for "
                    f"query of shape {tuple(query.shape)}"
                )
        if key_padding_mask is not None:
            if key_padding_mask.dtype != torch.bool:
                raise TypeError(
                    f"key_padding_mask: got {key_padding_mask.dtype}, expected torch.bool, True = ignore, or floating"
                )
            mask_shape = (keys,) if query.ndim == 2 else (query.shape[1 - length_dim], keys)
            if tuple(key_padding_mask.shape) != mask_shape:
                shape = tuple(key_padding_mask.shape)
                raise ValueError(f"key_padding_mask: got shape {shape}, expected {mask_shape}")

    def _op_call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
    ) -> tuple[str, tuple[Tensor, ...], dict[str, Any]]:
        """The op that computes this, and its arguments: ``cross_attention`` needs one context and stacked weights."""
        mask = None if key_padding_mask is None else ~key_padding_mask
        options: dict[str, Any] = {
            "key_padding_mask": mask if mask is None or query.ndim == 3 else mask[None],
            "dropout_p": self.dropout if self.training else 0.0,
            "backend": self.backend,
        }
        if key is value and key is not query and self._qkv_same_embed_dim and self.in_proj_bias is not None:
            weights = (self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
            tensors = (self._to_batch_first(query), self._to_batch_first(key), *weights)
            return "cross_attention", tensors, {"num_heads": self.num_heads, **options}
        projected = self._project(query, key, value)
        heads = tuple(self._to_batch_first(x).unflatten(-1, (self.num_heads, -1)) for x in projected)
        return "attention", heads, options

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, (..., E). As in torch, one product serves one tensor, and hooks of ``out_proj`` do not
        run."""
        width, bias = self.embed_dim, self.in_proj_bias
        weights: tuple[Tensor, ...]
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None, None, None) if bias is None else bias.split(width)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _to_batch_first(self, x: Tensor) -> Tensor:
        """(B, L, ...); B is 1 for an unbatched tensor."""
        if x.ndim == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _from_batch_first(self, x: Tensor, query: Tensor) -> Tensor:
        """The inverse of ``_to_batch_first``, in the layout of ``query``."""
        if query.ndim == 2:
            return x[0]
        return x if self.batch_first else x.transpose(0, 1)
