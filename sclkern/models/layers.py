"""Building blocks of the three encoders.

``layout`` says how the tokens lie (``sclkern.models.layouts``): (B, L, W) or packed (T, W), W the width. ``backend`` of
a module is one of ``layouts.MODEL_BACKENDS``. ``probabilities`` is a list that, when given, makes every attention take
the eager path and append its (B, H, Lq, Lk) probabilities, with their graph, before dropout; tokens are padded then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from sclkern import ops
from sclkern.models.config import HEAD_WIDTH
from sclkern.models.layouts import Layout, Packed, Rows, attend, by_part, from_parts, recorded
from sclkern.nn import DropoutAddLayerNorm, LinearGELU
from sclkern.ops.cross_attention import plan

ACTIVATIONS = {"quick_gelu": "quick", "gelu": "none"}


class Attention(nn.Module):
    """Multi-head attention whose query, key and value projections are stacked in one matrix, in that order.

    As self-attention one product projects all three; as cross-attention the query rows act on ``x`` and the key and
    value rows on ``context``.
    """

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.dropout = dropout
        self.backend, self.absorb = "auto", "auto"

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        context: Tensor | None = None,
        context_layout: Layout | None = None,
        *,
        probabilities: list[Tensor] | None = None,
    ) -> Tensor:
        """
        Args:
            x: tokens that ask, in ``layout``. context: tokens that answer, in ``context_layout``; None is x itself.

        Returns:
            Like x.
        """
        width = x.shape[-1]
        if context is not None and probabilities is None and self._absorbs(x, layout, context_layout):
            return self._cross(x, layout, context, context_layout)
        if context is None:
            query, key, value = self.in_proj(x).chunk(3, -1)
            context_layout = layout
        else:
            weight, bias = self.in_proj.weight, self.in_proj.bias
            query = F.linear(x, weight[:width], bias[:width])
            key, value = F.linear(context, weight[width:], bias[width:]).chunk(2, -1)
        query, key, value = (t.unflatten(-1, (-1, HEAD_WIDTH)) for t in (query, key, value))
        dropout_p = self.dropout if self.training else 0.0
        if probabilities is None:
            out = attend(query, key, value, layout, context_layout, dropout_p=dropout_p, backend=self.backend)
        else:
            out = recorded(query, key, value, context_layout, probabilities, dropout_p=dropout_p)
        return self.out_proj(out.flatten(-2))

    def _absorbs(self, x: Tensor, layout: Layout, context_layout: Layout) -> bool:
        """Whether the short side of a cross-attention, padded, takes in projections of the long one; else all parts are
        one packed call."""
        if self.absorb == "never" or self.backend == "sdpa" or not isinstance(layout, Packed):
            return False
        width = x.shape[-1]
        # Of the shapes that the op would see; it asks for nothing else.
        longest = (x.new_empty((0, each.max_seqlen, width)) for each in (layout, context_layout))
        form, _, _ = plan(
            *longest,
            num_heads=width // HEAD_WIDTH,
            dropout_p=self.dropout if self.training else 0.0,
            scale=HEAD_WIDTH**-0.5,
            absorb=self.absorb,
            backend=self.backend,
        )
        return form != "never"

    def _cross(self, x: Tensor, layout: Packed, context: Tensor, context_layout: Packed) -> Tensor:
        """The whole sub-layer, a call for each part of equal length."""

        def attended(x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
            if not x.numel():
                return x
            return ops.cross_attention(
                x,
                context,
                self.in_proj.weight,
                self.in_proj.bias,
                self.out_proj.weight,
                self.out_proj.bias,
                num_heads=x.shape[-1] // HEAD_WIDTH,
                key_padding_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                absorb=self.absorb,
                backend=self.backend,
            )

        asking, answering = by_part(x, layout, context_layout), by_part(context, context_layout, layout)
        parts = [attended(rows, keys, mask) for (rows, _), (keys, mask) in zip(asking, answering, strict=True)]
        return from_parts(parts, layout)


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, mlp_ratio: int, activation: str = "gelu") -> None:
        super().__init__()
        self.fc1 = LinearGELU(width, mlp_ratio * width, approximate=ACTIVATIONS[activation])
        self.fc2 = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


def run_block(block: nn.Module, *inputs, checkpoint: bool, **options) -> Tensor | tuple[Tensor, Tensor]:
    """What a block returns; with ``checkpoint`` its inputs alone are kept for the backward, which runs it again."""
    if not (checkpoint and torch.is_grad_enabled()) or options.get("probabilities") is not None:
        return block(*inputs, **options)
    return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, **options)


class AddNorm(DropoutAddLayerNorm):
    """LayerNorm of a residual stream to which what the last branch computed is still to be added."""

    def forward(
        self, x: Tensor, update: Tensor | None = None, *, return_sum: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: the stream; update: like x, None where nothing is to be added. With ``return_sum`` also their sum."""
        if update is None:
            normal = nn.LayerNorm.forward(self, x)
            return (normal, x) if return_sum else normal
        return ops.dropout_add_layer_norm(
            update, x, self.weight, self.bias, eps=self.eps, return_sum=return_sum, backend=self.backend
        )


class PreNormBlock(nn.Module):
    """CLIP's residual block: x + f(norm(x)), without dropout.

    What the last branch computed is returned apart from the stream: the norm that comes next, of another block, adds it
    in one op with itself.
    """

    def __init__(self, width: int, mlp_ratio: int, activation: str) -> None:
        super().__init__()
        self.attention_norm = AddNorm(width)
        self.attention = Attention(width)
        self.mlp_norm = AddNorm(width)
        self.mlp = FeedForward(width, mlp_ratio, activation)

    def forward(
        self, x: Tensor, update: Tensor | None, layout: Layout, probabilities: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x, update: the stream is their sum; None = x alone.

        Returns:
            The same pair for the next block, each like x.
        """
        normal, x = self.attention_norm(x, update, return_sum=True)
        update = self.attention(normal, layout, probabilities=probabilities)
        normal, x = self.mlp_norm(x, update, return_sum=True)
        return x, self.mlp(normal)


class PostNormBlock(nn.Module):
    """BERT's block: norm(x + dropout(f(x))), with cross-attention between the two when ``cross`` is set."""

    def __init__(self, width: int, mlp_ratio: int, dropout: float, eps: float, *, cross: bool = False) -> None:
        super().__init__()

        def norm() -> DropoutAddLayerNorm:
            return DropoutAddLayerNorm(width, dropout=dropout, eps=eps)

        self.attention = Attention(width, dropout)
        self.attention_norm = norm()
        if cross:
            self.cross_attention = Attention(width, dropout)
            self.cross_attention_norm = norm()
        self.mlp = FeedForward(width, mlp_ratio)
        self.mlp_norm = norm()

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        context: Tensor | None = None,
        context_layout: Layout | None = None,
        *,
        rows: Rows | None = None,
        probabilities: list[Tensor] | None = None,
    ) -> Tensor:
        """
        Args:
            x: tokens in ``layout``. context: given exactly when the block has ``cross``, in ``context_layout``.
            rows: the tokens of x whose output is wanted; None = all. Every token still answers.

        Returns:
            Like x, or the outputs of ``rows``.
        """
        if rows is None:
            update = self.attention(x, layout, probabilities=probabilities)
        else:
            asking = rows.take(x)
            update = self.attention(asking, rows.layout, x, layout, probabilities=probabilities)
            x, layout = asking, rows.layout
        x = self.attention_norm(update, x)
        if context is not None:
            update = self.cross_attention(x, layout, context, context_layout, probabilities=probabilities)
            x = self.cross_attention_norm(update, x)
        return self.mlp_norm(self.mlp(x), x)
