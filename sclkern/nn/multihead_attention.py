"""``MultiheadAttention``: torch's, on the fused attention wherever that says the same."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import ops
from sclkern.ops.attention import autocast, unsupported
from sclkern.ops.cross_attention import plan
from sclkern.ops.dispatch import BACKENDS, choose


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` that keeps no scores and no probabilities; its ``state_dict`` is torch's.

    Self-attention and attention to separate keys and values go through ``sclkern.ops.attention``; cross-attention (key
    and value one tensor, with biases) through ``sclkern.ops.cross_attention``, which multiplies less where one side is
    short. Whatever these cannot do is left to torch's own forward, and ``explain`` says so: attention maps (torch's
    default, so pass ``need_weights=False``), an attention mask, a causal hint, a padding mask to be added,
    ``add_bias_kv``, ``add_zero_attn``, nested tensors.

    Where torch differs: a query whose keys are all padding gets ``out_proj.bias`` (the projection of zeros) and gives
    no gradient to query, key and value; torch gives NaN. From one seed of torch's generator other probabilities may be
    dropped than torch drops; the kernels round ``dropout`` to a multiple of 1 / 65536.

    Args:
        embed_dim, num_heads, options: as in torch (``dropout``, ``bias``, ``add_bias_kv``, ``add_zero_attn``, ``kdim``,
            ``vdim``, ``batch_first``, ``device``, ``dtype``, in this order).
        backend: "auto", "triton" or "eager", of the fused ops; torch's forward heeds none.
    """

    def __init__(self, embed_dim: int, num_heads: int, *args, backend: str = "auto", **options) -> None:
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
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            query: (Lq, B, E), with ``batch_first`` (B, Lq, E), or (Lq, E); E is ``embed_dim``.
            key, value: (Lk, B, kdim) and (Lk, B, vdim), or as query lies.
            key_padding_mask: (B, Lk), or (Lk,) beside (Lk, E); bool, True = ignore, or floating, to be added.
            need_weights, attn_mask, average_attn_weights, is_causal: as in torch, and left to torch.

        Returns:
            Output like query, and None or, with ``need_weights``, torch's attention maps.

        Raises:
            TypeError: the padding mask is neither bool nor floating. ValueError: wrong shape, or "triton" asked for by
                name where it cannot run. Where torch computes, its own errors.
        """
        if self._left_to_torch(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal) is not None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value, key_padding_mask)
        mask = None if key_padding_mask is None else ~key_padding_mask
        options = {
            "key_padding_mask": mask if mask is None or query.ndim == 3 else mask[None],
            "dropout_p": self.dropout if self.training else 0.0,
            "backend": self.backend,
        }
        if self._is_cross(query, key, value):
            out = ops.cross_attention(
                self._by_sample(query), self._by_sample(key), *self._parameters_of_all(), num_heads=self.num_heads,
                **options,
            )  # fmt: skip
            # torch's result is contiguous in its own order.
            return self._as_given(out, query).contiguous(), None
        heads = (self._by_sample(t).unflatten(-1, (self.num_heads, -1)) for t in self._project(query, key, value))
        out = self._as_given(ops.attention(*heads, **options).flatten(-2), query)
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
        """What ``forward`` does with the same arguments: "triton: ...", "eager: ..." or "torch: ...", and why."""
        reason = self._left_to_torch(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if reason is not None:
            return f"torch: {reason}"
        self._check(query, key, value, key_padding_mask)
        scale = 1 / math.sqrt(self.head_dim)
        if self._is_cross(query, key, value):
            tensors = (self._by_sample(query), self._by_sample(key), *self._parameters_of_all())
            form, choice, _ = plan(
                *map(autocast, tensors),
                num_heads=self.num_heads,
                dropout_p=self.dropout if self.training else 0.0,
                scale=scale,
                backend=self.backend,
            )
            return str(choice) if form == "never" else f"{choice}; projections absorbed into the {form}"
        heads = [autocast(t).new_empty((0, 0, self.num_heads, self.head_dim)) for t in (query, key, value)]
        return str(choose(*heads, backend=self.backend, unsupported=unsupported(heads[0], scale)))

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"batch_first={self.batch_first}, backend={self.backend!r}"
        )

    def _left_to_torch(
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
            return "attention maps are asked for"
        if attn_mask is not None:
            return "an attention mask is given"
        if is_causal:
            return "a causal mask is asked for"
        if key_padding_mask is not None and key_padding_mask.is_floating_point():
            return "the padding mask is floating, to be added to the scores"
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
            expected = (keys,) if query.ndim == 2 else (query.shape[1 - length_dim], keys)
            if tuple(key_padding_mask.shape) != expected:
                shape = tuple(key_padding_mask.shape)
                raise ValueError(f"key_padding_mask: got shape {shape}, expected {expected}")

    def _is_cross(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether ``ops.cross_attention`` is this: its context is key and value, its weights are stacked."""
        return key is value and key is not query and self._qkv_same_embed_dim and self.in_proj_bias is not None

    def _parameters_of_all(self) -> tuple[Tensor, ...]:
        return self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """(..., E) each. As in torch, one product serves what is one tensor, and hooks of ``out_proj`` do not run."""
        width, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None, None, None) if bias is None else bias.split(width)
        return tuple(F.linear(*tensors) for tensors in zip((query, key, value), weights, biases, strict=True))

    def _by_sample(self, x: Tensor) -> Tensor:
        """(B, L, ...)."""
        if x.ndim == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _as_given(self, x: Tensor, query: Tensor) -> Tensor:
        """The inverse of ``_by_sample``, for a tensor that lies as ``query`` does."""
        if query.ndim == 2:
            return x[0]
        return x if self.batch_first else x.transpose(0, 1)
