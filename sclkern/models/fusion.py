"""The fusion encoder: two streams that read each other (METER, arXiv 2111.02387; bert_model.py's BertCrossLayer)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from sclkern.models.config import SCLConfig
from sclkern.models.layers import PostNormBlock, run_block
from sclkern.models.layouts import Layout, Rows
from sclkern.profiling import phase

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


class Section(NamedTuple):
    """Neighbouring rows of a batch, [start, stop) of its first dimension, and their layout."""

    start: int
    stop: int
    layout: Layout

    def take(self, x: Tensor) -> Tensor:
        return x[self.start : self.stop]


class Reads(NamedTuple):
    """The tokens that somebody reads: the last layer computes no others.

    Attributes:
        text, image: of the text stream, and of the image tokens in ``image_section``.
        text_section, image_section: the image tokens that answer to either; the others are not even projected.
    """

    text: Rows
    image: Rows
    text_section: Section
    image_section: Section


class FusionEncoder(nn.Module):
    """Layers of self-attention, cross-attention and feed-forward; both streams read the previous layer's outputs."""

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()

        def layers() -> nn.ModuleList:
            return nn.ModuleList(
                PostNormBlock(config.width, config.mlp_ratio, config.dropout, LAYER_NORM_EPS, cross=True)
                for _ in range(config.fusion_layers)
            )

        self.checkpoint_blocks = False
        self.text_layers = layers()
        self.image_layers = layers()

    def forward(
        self,
        text: Tensor,
        text_layout: Layout,
        image: Tensor,
        image_layout: Layout,
        *,
        reads: Reads | None = None,
        attentions: list[LayerAttention] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse the two streams.

        Args:
            text, image: tokens in their layouts, (B, L, D) or packed (T, D); both layouts of the same sequences.
            reads: what is wanted of the last layer; None = all.

        Returns:
            Both streams, fused: like text and image, or the rows of ``reads``.
        """
        run = partial(run_block, checkpoint=self.checkpoint_blocks)
        layers = list(zip(self.text_layers, self.image_layers, strict=True))
        for number, (text_layer, image_layer) in enumerate(layers if reads is None else layers[:-1]):
            maps = None if attentions is None else []
            with phase(f"fusion layer {number}"):
                text, image = (
                    run(text_layer, text, text_layout, image, image_layout, probabilities=maps),
                    run(image_layer, image, image_layout, text, text_layout, probabilities=maps),
                )
            if maps is not None:
                attentions.append(LayerAttention(*maps))
        if reads is None:
            return text, image
        own, context = reads.image_section, reads.text_section
        if not layers:
            return reads.text.take(text), reads.image.take(own.take(image))
        # A stream that nobody reads is not computed at all.
        outputs = [reads.text.take(text), reads.image.take(own.take(image))]
        with phase(f"fusion layer {len(layers) - 1}"):
            if outputs[0].numel():
                outputs[0] = run(layers[-1][0], text, text_layout, context.take(image), context.layout, rows=reads.text)
            if outputs[1].numel():
                outputs[1] = run(layers[-1][1], own.take(image), own.layout, text, text_layout, rows=reads.image)
        return outputs[0], outputs[1]
