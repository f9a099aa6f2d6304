"""RoBERTa's encoder (Liu et al. 2019, arXiv 1907.11692) as the reference uses it: without its pooler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sclkern.models.config import SCLConfig
from sclkern.models.layers import PostNormBlock, run_block
from sclkern.models.layouts import Layout, Padded

# RoBERTa's own epsilon; the fusion layers have another.
LAYER_NORM_EPS = 1e-5


class TextEncoder(nn.Module):
    """Token ids to features. Positions start at pad_id + 1 and skip padding."""

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()
        self.pad_id, self.checkpoint_blocks = config.pad_id, False
        self.word = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.position = nn.Embedding(config.text_positions, config.width, padding_idx=config.pad_id)
        self.token_type = nn.Embedding(config.text_types, config.width)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(config.width, config.mlp_ratio, config.dropout, LAYER_NORM_EPS)
            for _ in range(config.text_layers)
        )

    def forward(self, ids: Tensor, mask: Tensor, probabilities: list[Tensor] | None = None) -> Tensor:
        """ids: (B, L) int64; mask: (B, L) bool, True = a token. Returns (B, L, D); rows of padding are undefined."""
        return self.encode(ids, self.positions(ids), Padded(mask), probabilities)

    def positions(self, ids: Tensor) -> Tensor:
        """Rows of the position table for ids (B, L)."""
        # As RoBERTa counts: by the ids, so a masked token keeps its place and padding does not move the rest.
        is_token = ids.ne(self.pad_id)
        return torch.where(is_token, is_token.cumsum(1) + self.pad_id, self.pad_id)

    def encode(
        self, ids: Tensor, positions: Tensor, layout: Layout, probabilities: list[Tensor] | None = None
    ) -> Tensor:
        """ids, positions: (B, L) or packed (T,) int64, as ``layout`` says. Returns (..., D)."""
        x = self.word(ids) + self.position(positions) + self.token_type.weight[0]
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = run_block(block, x, layout, checkpoint=self.checkpoint_blocks, probabilities=probabilities)
        return x
