"""RoBERTa's encoder (Liu et al. 2019, arXiv 1907.11692) as the published code uses it: without its pooler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sclkern.models.config import SCLConfig
from sclkern.models.execution import Execution
from sclkern.models.layers import PostNormBlock, Stream, dropped_sum, run_block
from sclkern.models.layouts import Layout, Padded
from sclkern.models.norms import LayerNorm

# RoBERTa's epsilon; that of the fusion layers differs.
LAYER_NORM_EPS = 1e-5


class TextEncoder(nn.Module):
    """Token ids to features. Positions start at pad_id + 1 and skip padding.

    Args:
        config: the sizes.
        execution: how it runs; shared with the network.
    """

    def __init__(self, config: SCLConfig, execution: Execution | None = None) -> None:
        super().__init__()
        self.pad_id = config.pad_id
        self.execution = shared = execution or Execution()
        self.word = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.position = nn.Embedding(config.text_positions, config.width, padding_idx=config.pad_id)
        self.token_type = nn.Embedding(config.text_types, config.width)
        self.norm = LayerNorm(config.width, LAYER_NORM_EPS, shared)
        self.dropout = nn.Dropout(config.dropout)
        self.dropout_number = 0
        self.blocks = nn.ModuleList(
            PostNormBlock(config.width, config.mlp_ratio, config.dropout, LAYER_NORM_EPS, execution=shared)
            for _ in range(config.text_layers)
        )

    def forward(self, ids: Tensor, mask: Tensor, probabilities: list[Tensor] | None = None) -> Tensor:
        """Encode a padded batch.

        Args:
            ids: (B, L) int64.
            mask: (B, L) bool, True = a token.
            probabilities: receives the (B, H, L, L) attention probabilities of each block (eager path).

        Returns:
            (B, L, D); rows of padding are undefined.
        """
        return self.encode(ids, self.positions(ids, mask), Padded(mask), probabilities)

    def positions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Rows of the position table for ids (B, L) with a mask (B, L) bool, True = a token."""
        # RoBERTa counts ids, so a masked token keeps its position. Padding, of whatever id, does not move the others.
        is_token = ids.ne(self.pad_id) & mask
        return torch.where(is_token, is_token.cumsum(1) + self.pad_id, self.pad_id)

    def encode(
        self, ids: Tensor, positions: Tensor, layout: Layout, probabilities: list[Tensor] | None = None
    ) -> Tensor:
        """Encode tokens in any layout.

        Args:
            ids: (B, L) or packed (T,) int64.
            positions: like ids, rows of the position table.
            layout: of both.
            probabilities: receives the attention probabilities of each block; padded tokens only.

        Returns:
            (B, L, D) or (T, D).
        """
        x = self.word(ids) + self.position(positions) + self.token_type.weight[0]
        x = self.norm(x)
        if layout.keys is None or not self.training or self.dropout.p == 0:
            x = self.dropout(x)
        else:
            keyed = {"seed": layout.keys.seeds[self.dropout_number], "dropout_ids": layout.keys.tokens}
            x = dropped_sum(x, torch.zeros_like(x), self.dropout.p, self.execution.op_backend, **keyed)
        checkpoint = self.execution.checkpoint_blocks
        stream = Stream.of(x)
        for block in self.blocks:
            stream = run_block(block, stream, layout, checkpoint=checkpoint, probabilities=probabilities)
        return stream.tokens
