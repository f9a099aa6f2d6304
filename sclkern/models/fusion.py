"""The fusion encoder: two streams that read each other (METER, arXiv 2111.02387; bert_model.py's BertCrossLayer)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from sclkern.models.config import SCLConfig
from sclkern.models.layers import PostNormBlock

LAYER_NORM_EPS = 1e-12


class LayerAttention(NamedTuple):
    """Attention probabilities of one fusion layer, with their graph. Lt text tokens, Li image tokens.

    Attributes:
        text: (B, H, Lt, Lt). text_to_image: (B, H, Lt, Li). image: (B, H, Li, Li). image_to_text: (B, H, Li, Lt).
    """

    text: Tensor
    text_to_image: Tensor
    image: Tensor
    image_to_text: Tensor


class FusionEncoder(nn.Module):
    """Layers of self-attention, cross-attention and feed-forward; both streams read the previous layer's outputs."""

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()

        def layers() -> nn.ModuleList:
            return nn.ModuleList(
                PostNormBlock(config.width, config.mlp_ratio, config.dropout, LAYER_NORM_EPS, cross=True)
                for _ in range(config.fusion_layers)
            )

        self.text_layers = layers()
        self.image_layers = layers()

    def forward(
        self, text: Tensor, text_mask: Tensor, image: Tensor, attentions: list[LayerAttention] | None = None
    ) -> tuple[Tensor, Tensor]:
        """text: (B, Lt, D); text_mask: (B, Lt) bool; image: (B, Li, D), never padded. Returns both, fused."""
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            maps = None if attentions is None else []
            text, image = (
                text_layer(text, text_mask, image, None, probabilities=maps),
                image_layer(image, None, text, text_mask, probabilities=maps),
            )
            if maps is not None:
                attentions.append(LayerAttention(*maps))
        return text, image
