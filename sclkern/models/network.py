"""SCLNetwork: the encoders, the fusion encoder and the heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from sclkern.libraries import apex, flash
from sclkern.models.attention import Attention
from sclkern.models.captions import check_captions, check_mask, first_token
from sclkern.models.casting import weights_cast
from sclkern.models.config import SCLConfig
from sclkern.models.execution import LAYER_NORMS, MODEL_BACKENDS, Execution
from sclkern.models.fusion import FusionEncoder, LayerAttention
from sclkern.models.heads import MLP, MLMHead, Pooler
from sclkern.models.layers import PostNormBlock, PreNormBlock, ResidualNorm
from sclkern.models.layouts import Padded
from sclkern.models.text import TextEncoder
from sclkern.models.vision import VisionEncoder, VisionFeatures
from sclkern.random import one_seed_draw

# Rows of the modality table.
TEXT_TYPE, IMAGE_TYPE = 0, 1


class FusedFeatures(NamedTuple):
    """Output of the fusion encoder.

    Attributes:
        text: (B, L, D).
        image: the image stream, tokens (B, F + F * P, D).
        attentions: the probabilities of each layer if ``return_attention`` was set, else None.
        text_mask: (B, L) bool, where captions have tokens; None if each begins at the first position.
    """

    text: Tensor
    image: VisionFeatures
    attentions: list[LayerAttention] | None = None
    text_mask: Tensor | None = None

    @property
    def text_cls(self) -> Tensor:
        """(B, D), wherever captions are padded."""
        return first_token(self.text, self.text_mask)

    @property
    def cls(self) -> tuple[Tensor, Tensor]:
        """What ``SCLNetwork.pool`` takes: text (B, D) and image (B, F, D)."""
        return self.text_cls, self.image.cls


class SCLNetwork(nn.Module):
    """Encoders, fusion encoder and heads of SCL (arXiv 2211.13437; architecture as in the released scl_module.py).

    It computes features and knows nothing of objectives, steps and files; ``sclkern.SCLModel`` adds those.

    Args:
        config: the sizes, and which heads exist.
    """

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()
        self.config = config
        self.execution = Execution()
        width = config.width
        self.text = TextEncoder(config, self.execution)
        self.vision = VisionEncoder(config, self.execution)
        self.text_transform = nn.Linear(width, width)
        self.image_transform = nn.Linear(width, width)
        self.modality = nn.Embedding(config.token_types, width)
        self.fusion = FusionEncoder(config, self.execution)
        self.text_pooler = Pooler(width)
        self.image_pooler = Pooler(width)
        if "itm" in config.heads:
            self.itm_head = nn.Linear(2 * width, 2)
        if "mlm" in config.heads:
            self.mlm_head = MLMHead(width, config.vocab_size, self.execution)
        if "itc" in config.heads:
            self.text_projection = MLP(width, width, config.projection_dim, self.execution)
            self.image_projection = MLP(width, width, config.projection_dim, self.execution)
            self.temperature = nn.Parameter(torch.tensor(config.temperature_init))
        if "vqa" in config.heads:
            self.vqa_head = MLP(2 * width, 2 * width, config.vqa_answers, self.execution)
        if "nlvr2" in config.heads:
            self.nlvr2_head = MLP(4 * width, 2 * width, 2, self.execution)
        if "rank" in config.heads:
            self.rank_head = nn.Linear(2 * width, 1)
        self._initialise()
        # Each draws its dropout masks by a seed of its own; the image encoder has no dropout.
        with_dropout = [
            module
            for encoder in (self.text, self.fusion)
            for module in encoder.modules()
            if isinstance(module, TextEncoder | Attention | ResidualNorm)
        ]
        for number, module in enumerate(with_dropout):
            module.dropout_number = number
        self.dropout_modules = len(with_dropout)

    def _initialise(self) -> None:
        """BERT's normal distribution, and Xavier in the vision encoder (published code: both ``init_weights``)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.startswith("vision."):
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=self.config.init_std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx])

    @property
    def backend(self) -> str:
        """The backend of every op other than attention: "auto", "triton" or "eager"."""
        return self.execution.op_backend

    def set_backend(self, backend: str) -> Self:
        """Choose what every op of the network runs on.

        Args:
            backend: "auto" takes the kernels where they can run; "triton" requires them; "eager" is plain PyTorch
                (``sclkern.reference``); "sdpa" is plain PyTorch with torch's own fused attention; "flash" is "auto"
                with the attention of flash-attn 2, which draws dropout masks of its own, and absorbs no projections.

        Returns:
            The network itself.

        Raises:
            ValueError: not one of these names, or flash-attn is not there.
        """
        if backend not in MODEL_BACKENDS:
            raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(MODEL_BACKENDS)}")
        if backend == "flash" and (missing := flash.missing()):
            raise ValueError(f"backend: got 'flash', but {missing}")
        self.execution.backend = backend
        return self

    def set_layer_norm(self, layer_norm: str) -> Self:
        """Choose what every LayerNorm of the network runs on; parameters and their names stay.

        Args:
            layer_norm: "sclkern" is one op with what precedes the norm (dropout and sum, the patch embedding), and
                torch's elsewhere; "torch" is torch's, after plain dropout and sum; "apex" is likewise, by apex's
                kernel.

        Returns:
            The network itself.

        Raises:
            ValueError: not one of these names, or apex is not there.
        """
        if layer_norm not in LAYER_NORMS:
            raise ValueError(f"layer_norm: got {layer_norm!r}, expected one of {', '.join(LAYER_NORMS)}")
        if layer_norm == "apex" and (missing := apex.FUSED_LAYER_NORM.problem()):
            raise ValueError(f"layer_norm: got 'apex', but {missing}")
        self.execution.layer_norm = layer_norm
        return self

    def weights_cast(self) -> AbstractContextManager[None]:
        """Under autocast, cast the weights of all linear layers outside of blocks in one launch, while this is entered.
        Blocks cast their own."""
        return weights_cast(self._outside_of_blocks(), self.modality.weight.device.type)

    def _outside_of_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        # The modules of a block follow it.
        inside = "."
        for name, module in self.named_modules():
            if not name.startswith(inside):
                yield name, module
                inside = f"{name}." if isinstance(module, PreNormBlock | PostNormBlock) else inside

    # -- encoders ----------------------------------------------------------------------------------------------------

    def encode_text(self, ids: Tensor, mask: Tensor, *, attentions: list[Tensor] | None = None) -> Tensor:
        """Unimodal text features after the modality transform.

        Args:
            ids: (B, L) int64.
            mask: (B, L) bool or 0/1, True or 1 = a token; padding may stand anywhere.
            attentions: receives the (B, H, L, L) attention probabilities of each block (eager path).

        Returns:
            (B, L, D), in the order of ids; rows of padding are undefined. ``models.captions.first_token`` takes each
            caption's CLS.

        Raises:
            TypeError: see ``models.captions.check_captions``.
            ValueError: wrong shape, captions longer than ``max_text_len``; see ``models.captions.check_captions``.
        """
        mask = check_captions(ids, mask, self.config).mask
        with one_seed_draw():
            return self.text_transform(self.text(ids, mask, attentions))

    def encode_image(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        replace: Tensor | None = None,
        attentions: list[Tensor] | None = None,
    ) -> VisionFeatures:
        """Unimodal image features after the modality transform.

        Args:
            images: (B, 3, S, S) or (B, F, 3, S, S), float.
            keep: (B, K) int64, patches that are embedded, the same in every frame; None = all.
            replace: (B, P) bool, patches that become the mask token, the same in every frame.
            attentions: receives the attention probabilities of each block; see ``VisionEncoder.forward``.

        Returns:
            The features.

        Raises:
            ValueError: as in ``VisionEncoder.forward``.
        """
        features = self.vision(images, keep=keep, replace=replace, probabilities=attentions)
        return features.with_tokens(self.image_transform(features.tokens))

    def run_fusion(
        self,
        text: Tensor,
        text_mask: Tensor,
        image: VisionFeatures,
        *,
        image_type: int = IMAGE_TYPE,
        return_attention: bool = False,
    ) -> FusedFeatures:
        """Run the fusion encoder on unimodal features.

        Args:
            text: (B, L, D) from ``encode_text``.
            text_mask: (B, L) bool or 0/1, as given to ``encode_text``.
            image: from ``encode_image``.
            image_type: row of the modality table: 1, or 2 for the second image of NLVR2.
            return_attention: keep every layer's attention probabilities, with their graph (eager path).

        Returns:
            The fused features of both streams.

        Raises:
            ValueError: ``text_mask`` is not of text's shape; where values are read, it has other numbers than 1 and 0.
        """
        text_mask = check_mask(text_mask, text.shape[:2])
        attentions: list[LayerAttention] | None = [] if return_attention else None
        with one_seed_draw():
            fused_text, fused_image = self.fusion(
                text + self.modality.weight[TEXT_TYPE],
                Padded(text_mask),
                image.tokens + self.modality.weight[image_type],
                Padded(),
                attentions=attentions,
            )
        return FusedFeatures(fused_text, image.with_tokens(fused_image), attentions, text_mask)

    def pool(self, text_cls: Tensor, image_cls: Tensor) -> Tensor:
        """What the heads of a fused pair read: the pooled CLS features of both streams.

        Args:
            text_cls: (B, D) fused.
            image_cls: (B, F, D) fused, one CLS a frame.

        Returns:
            (B, 2 D): text, then image.
        """
        return torch.cat([self.text_pooler(text_cls[:, None]), self.image_pooler(image_cls)], dim=-1)

    def project(self, text_cls: Tensor, image_cls: Tensor) -> tuple[Tensor, Tensor]:
        """What the image-text contrast compares: the projected CLS features of both encoders, not normalised.

        Args:
            text_cls: (B, D) unimodal.
            image_cls: (B, F, D) unimodal, one CLS a frame.

        Returns:
            Text and image, (B, projection_dim) each.
        """
        return self.text_projection(text_cls), self.project_image(image_cls)

    def project_image(self, image_cls: Tensor) -> Tensor:
        """The part of ``project`` for images alone."""
        projected: Tensor = self.image_projection(image_cls.mean(1))
        return projected
