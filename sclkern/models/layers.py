"""Building blocks of the three encoders.

Dimensions: B batch, L length, D width, H heads.

``probabilities`` is a list that, when given, makes every attention take the eager path and append its (B, H, Lq, Lk)
probabilities, with their graph, before dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sclkern import reference
from sclkern.models.config import HEAD_WIDTH


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


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
        self.backend = "sdpa"

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        num_frames: int = 1,
        probabilities: list[Tensor] | None = None,
    ) -> Tensor:
        """
        Args:
            x: (B, Lq, D). context: (B, Lk, D) or None for self-attention.
            key_padding_mask: (B, Lk) bool, True = attend.
            num_frames: above 1, ``reference.frame_attention``'s pattern (self-attention without padding).

        Returns:
            (B, Lq, D).
        """
        width = x.shape[-1]
        if context is None:
            query, key, value = self.in_proj(x).chunk(3, -1)
        else:
            weight, bias = self.in_proj.weight, self.in_proj.bias
            query = F.linear(x, weight[:width], bias[:width])
            key, value = F.linear(context, weight[width:], bias[width:]).chunk(2, -1)
        query, key, value = (t.unflatten(-1, (-1, HEAD_WIDTH)) for t in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if probabilities is not None:
            mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
            if num_frames > 1:
                mask = reference.frame_attention_mask(num_frames, x.shape[1] // num_frames, x.device)
            weights = reference.attention_probabilities(query, key, mask=mask)
            probabilities.append(weights)
            out = torch.einsum("bhqk,bkhd->bqhd", F.dropout(weights, dropout), value)
        elif num_frames > 1:
            out = reference.frame_attention(query, key, value, num_frames)
        elif self.backend == "eager":
            out = reference.attention(query, key, value, key_padding_mask=key_padding_mask, dropout_p=dropout)
        else:
            mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout).transpose(1, 2)
        return self.out_proj(out.flatten(-2))


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, mlp_ratio: int, activation: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class PreNormBlock(nn.Module):
    """CLIP's residual block: x + f(norm(x)), without dropout."""

    def __init__(self, width: int, mlp_ratio: int, activation: str) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, mlp_ratio, activation)

    def forward(self, x: Tensor, num_frames: int = 1, probabilities: list[Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), num_frames=num_frames, probabilities=probabilities)
        return x + self.mlp(self.mlp_norm(x))


class PostNormBlock(nn.Module):
    """BERT's block: norm(x + dropout(f(x))), with cross-attention between the two when ``cross`` is set."""

    def __init__(self, width: int, mlp_ratio: int, dropout: float, eps: float, *, cross: bool = False) -> None:
        super().__init__()
        self.attention = Attention(width, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        if cross:
            self.cross_attention = Attention(width, dropout)
            self.cross_attention_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = FeedForward(width, mlp_ratio)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        probabilities: list[Tensor] | None = None,
    ) -> Tensor:
        """x: (B, L, D); mask: (B, L) bool or None; context: (B, Lk, D), given exactly when the block has ``cross``."""
        update = self.attention(x, key_padding_mask=mask, probabilities=probabilities)
        x = self.attention_norm(x + self.dropout(update))
        if context is not None:
            update = self.cross_attention(x, context, key_padding_mask=context_mask, probabilities=probabilities)
            x = self.cross_attention_norm(x + self.dropout(update))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))
