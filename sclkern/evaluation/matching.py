"""Pairs of encoded texts and images through the fusion encoder, packed, for what the heads of a pair read.

Each text and each image is encoded once. Of a pair only what depends on both is computed: texts are not padded,
self-attention of the first layer is that of the image alone, cross-attention folds the projections of the long side
into the short one, and the last layer computes only the CLS tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sclkern.models import SCLNetwork, VisionFeatures
from sclkern.models.fusion import OutputSelection
from sclkern.models.layouts import Packed, Rows, Section
from sclkern.models.network import IMAGE_TYPE, TEXT_TYPE
from sclkern.step.encoding import packed_layout


class EncodedTexts(NamedTuple):
    """Unimodal tokens of texts, one text after another in any order, without padding.

    Attributes:
        tokens: (T, D).
        starts: (C,) int64 on the host, where each text begins.
        lengths: (C,) int64 on the host, its tokens.
    """

    tokens: Tensor
    starts: np.ndarray
    lengths: np.ndarray


class ImageBatch:
    """Images whose pairs are fused together.

    Args:
        network: in eval mode.
        features: of N images, on the network's device.
    """

    def __init__(self, network: SCLNetwork, features: VisionFeatures) -> None:
        self.network, self.num_frames = network, features.num_frames
        self.tokens = features.tokens + network.modality.weight[IMAGE_TYPE]
        rows, self.length, _ = self.tokens.shape
        layout = packed_layout(((rows, self.length),), 1, self.tokens.device)
        self.attended = network.fusion.attend_image(self.tokens.flatten(0, 1), layout).view_as(self.tokens)

    def pooled(self, texts: EncodedTexts, image: np.ndarray, text: np.ndarray) -> Tensor:
        """Fuse pairs.

        Args:
            texts: of the gallery.
            image: (pairs,) rows of this batch.
            text: (pairs,) rows of ``texts``, shortest first.

        Returns:
            (pairs, 2 D), what the heads of a fused pair read.
        """
        device = self.tokens.device
        lengths, counts = np.unique(texts.lengths[text], return_counts=True)
        ends = np.cumsum(counts)[:-1]
        positions = [
            (starts[:, None] + np.arange(length)).ravel()
            for starts, length in zip(np.split(texts.starts[text], ends), lengths, strict=True)
        ]
        tokens = texts.tokens.index_select(0, torch.from_numpy(np.concatenate(positions)).to(texts.tokens.device))
        rows = torch.from_numpy(image).to(device)
        groups = list(zip(counts.tolist(), lengths.tolist(), strict=True))

        def layout(length: int | None = None) -> Packed:
            # Of the same groups everywhere, so that they stand opposite one another.
            return packed_layout(tuple((count, length or of_text) for count, of_text in groups), 1, device)

        text_layout, image_layout = layout(), layout(self.length)
        section = Section(0, len(image) * self.length, image_layout)
        frame_cls = image_layout.cu_seqlens[:-1].long()[:, None] + torch.arange(self.num_frames, device=device)
        outputs = OutputSelection(
            Rows(text_layout.cu_seqlens[:-1].long(), layout(1)),
            Rows(frame_cls.flatten(), layout(self.num_frames)),
            section,
            section,
        )
        text_cls, image_cls = self.network.fusion(
            tokens.to(device) + self.network.modality.weight[TEXT_TYPE],
            text_layout,
            self.tokens.index_select(0, rows).flatten(0, 1),
            image_layout,
            outputs=outputs,
            image_attended=self.attended.index_select(0, rows).flatten(0, 1),
        )
        return self.network.pool(text_cls, image_cls.unflatten(0, (-1, self.num_frames)))
