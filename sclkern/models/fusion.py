"""The fusion encoder: two streams with co-attention (METER, arXiv 2111.02387; bert_model.py's BertCrossLayer)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from sclkern.models.config import SCLConfig
from sclkern.models.execution import Execution
from sclkern.models.layers import PostNormBlock, Stream, run_block
from sclkern.models.layouts import Layout, Rows, Section
from sclkern.profiling import phase

LAYER_NORM_EPS = 1e-12


class LayerAttention(NamedTuple):
    """Attention probabilities of one fusion layer, with their graph. Lt text tokens, Li image tokens.

    Attributes:
        text: (B, H, Lt, Lt).
        text_to_image: (B, H, Lt, Li).
        image: (B, H, Li, Li).
        image_to_text: (B, H, Li, Lt).
    """

    text: Tensor
    text_to_image: Tensor
    image: Tensor
    image_to_text: Tensor


class OutputSelection(NamedTuple):
    """The tokens whose output is used: the last layer computes no others.

    Attributes:
        text: rows of the text stream.
        image: rows of the image tokens in ``image_section``.
        text_context: the image tokens that the text stream of the last layer attends to.
        image_section: the image tokens that the image stream of the last layer projects.
    """

    text: Rows
    image: Rows
    text_context: Section
    image_section: Section


class FusionEncoder(nn.Module):
    """Layers of self-attention, cross-attention and feed-forward; both streams read the previous layer's outputs.

    Args:
        config: the sizes.
        execution: how it runs; shared with the network.
    """

    def __init__(self, config: SCLConfig, execution: Execution | None = None) -> None:
        super().__init__()
        self.execution = shared = execution or Execution()

        def layers() -> nn.ModuleList:
            return nn.ModuleList(
                PostNormBlock(
                    config.width, config.mlp_ratio, config.dropout, LAYER_NORM_EPS, cross=True, execution=shared
                )
                for _ in range(config.fusion_layers)
            )

        self.text_layers = layers()
        self.image_layers = layers()

    def attend_image(self, image: Tensor, layout: Layout) -> Tensor:
        """What the first layer does to images before it sees their texts: self-attention.

        Args:
            image: as in ``forward``.
            layout: of image.

        Returns:
            Like image; image itself where there is no layer.
        """
        if not len(self.image_layers):
            return image
        first = cast(PostNormBlock, self.image_layers[0])
        return first.attend(Stream.of(image), layout).tokens

    def forward(
        self,
        text: Tensor,
        text_layout: Layout,
        image: Tensor,
        image_layout: Layout,
        *,
        outputs: OutputSelection | None = None,
        image_attended: Tensor | None = None,
        attentions: list[LayerAttention] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse the two streams.

        Args:
            text: tokens (B, Lt, D) or packed (T, D).
            text_layout: of text.
            image: tokens (B, Li, D) or packed (T, D), of the same sequences.
            image_layout: of image.
            outputs: the tokens whose output is used; None = all.
            image_attended: like image, ``attend_image`` of it, which texts of the same image share; None computes it.
            attentions: receives the probabilities of every layer; only without ``outputs``.

        Returns:
            Both fused streams: like text and image, or the rows of ``outputs``.
        """
        text_stream, image_stream = Stream.of(text), Stream.of(image)
        attended = None if image_attended is None else Stream.of(image_attended)
        run = partial(run_block, checkpoint=self.execution.checkpoint_blocks)
        layers = list(zip(self.text_layers, self.image_layers, strict=True))
        for number, (text_layer, image_layer) in enumerate(layers if outputs is None else layers[:-1]):
            maps: list[Tensor] | None = None if attentions is None else []
            shared: dict[str, Any] = {} if number or attended is None else {"attended": attended}
            with phase(f"fusion layer {number}"):
                text_stream, image_stream = (
                    run(text_layer, text_stream, text_layout, image_stream.read, image_layout, probabilities=maps),
                    run(
                        image_layer, image_stream, image_layout, text_stream.read, text_layout, **shared,
                        probabilities=maps,
                    ),
                )  # fmt: skip
            if attentions is not None and maps is not None:
                attentions.append(LayerAttention(*maps))
        if outputs is None:
            return text_stream.tokens, image_stream.tokens
        context, section = outputs.text_context.take(image_stream.read), image_stream.take(outputs.image_section)
        if not layers:
            return outputs.text.take(text), outputs.image.take(section.tokens)
        text_layer, image_layer = layers[-1]
        shared = {}
        if attended is not None and len(layers) == 1:
            shared = {"attended": attended.take(outputs.image_section)}
        section_layout = outputs.image_section.layout
        # A stream without outputs is not computed at all.
        with phase(f"fusion layer {len(layers) - 1}"):
            if outputs.text.length:
                context_layout = outputs.text_context.layout
                text_out = run(text_layer, text_stream, text_layout, context, context_layout, rows=outputs.text)
            else:
                text_out = text_stream.take(outputs.text)
            if outputs.image.length:
                image_out = run(
                    image_layer, section, section_layout, text_stream.read, text_layout, rows=outputs.image, **shared
                )  # fmt: skip
            else:
                image_out = section.take(outputs.image)
        return text_out.tokens, image_out.tokens
