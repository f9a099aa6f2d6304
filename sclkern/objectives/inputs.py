"""What a step hands to the loss of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sclkern.models.network import SCLNetwork
from sclkern.objectives.config import ObjectiveConfig
from sclkern.objectives.views import ImageTokens, ImageVariant, TextTokens, TextVariant, View


@dataclass(frozen=True)
class TokenPositions:
    """Where the tokens of each kind stand in a sequence, with room for the same number K in every row.

    Attributes:
        index: (B, K) int64 positions by kind. Where a row has fewer tokens of the kind than K, what fills the room are
            positions of other tokens of the row.
        valid: (B, K) bool by kind: which positions hold a token of the kind. "cls", which every row has, is not in it.
    """

    index: dict[str, Tensor]
    valid: dict[str, Tensor]

    def concatenate(self, kinds: tuple[str, ...]) -> Tensor:
        """Join the positions of several kinds.

        Args:
            kinds: which, in order.

        Returns:
            (B, sum of K) int64.
        """
        return torch.cat([self.index["cls"][:, :0], *(self.index[kind] for kind in kinds)], dim=1)

    def split(self, tokens: Tensor, kinds: tuple[str, ...]) -> dict[str, Tensor]:
        """Undo ``concatenate`` on the tokens at its positions.

        Args:
            tokens: (B, sum of K, D).
            kinds: as given to ``concatenate``.

        Returns:
            (B, K, D) by kind.
        """
        parts = tokens.split([self.index[kind].shape[1] for kind in kinds], dim=1) if kinds else ()
        return dict(zip(kinds, parts, strict=True))


@dataclass
class LossInputs:
    """Features of a step, for losses. B batch, L padded caption length, F frames, P patches, D width.

    Attributes:
        network: for its heads.
        options: of the objectives.
        batch: as given to the step.
        num_frames: F.
        text_encodings: (B, L, D) by variant, before fusion, of the variants that an objective lists in
            ``unimodal_texts``; padding rows are undefined.
        image_encodings: (B, F * (1 + P), D) by variant, before fusion, frame by frame with the CLS first.
        match_labels: (B,) int64, 1 where a view with image variant "matching" has the row's own image, else 0; None
            where no view has this variant.
        text_positions: of the tokens of each kind in a caption.
        image_positions: of the tokens of each kind in an image that has all patches.
        text_tokens: (B, K, D) fused tokens by view and kind; empty before fusion.
        image_tokens: likewise, of the image stream.
        counts: 0-d by kind of token ("mlm", "completion"): what a sum over its tokens is divided by, see
            ``sclkern.step.target_counts``; None divides by those of the batch.
    """

    network: SCLNetwork
    options: ObjectiveConfig
    batch: Mapping[str, Any]
    num_frames: int
    text_encodings: dict[str, Tensor]
    image_encodings: dict[str, Tensor]
    match_labels: Tensor | None
    text_positions: TokenPositions
    image_positions: TokenPositions
    text_tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    image_tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    counts: Mapping[str, Tensor] | None = None

    def text(self, view: View, tokens: TextTokens = "cls") -> Tensor:
        """Fused text tokens of a view.

        Args:
            view: a view that the objective lists in ``outputs``.
            tokens: their kind.

        Returns:
            (B, K, D).
        """
        return _read(self.text_tokens, view, tokens)

    def image(self, view: View, tokens: ImageTokens = "cls") -> Tensor:
        """Fused image tokens of a view.

        Args:
            view: a view that the objective lists in ``outputs``.
            tokens: their kind.

        Returns:
            (B, K, D); of "cls" (B, F, D).
        """
        return _read(self.image_tokens, view, tokens)

    def unimodal_text_cls(self, variant: TextVariant = "complete") -> Tensor:
        """CLS of a caption before fusion.

        Args:
            variant: one that the objective lists in ``unimodal_texts``.

        Returns:
            (B, D).
        """
        return self.text_encodings[variant][:, 0]

    def unimodal_image_cls(self, variant: ImageVariant = "complete") -> Tensor:
        """CLS of each frame before fusion.

        Args:
            variant: one that the objective lists in ``unimodal_images``.

        Returns:
            (B, F, D).
        """
        image = self.image_encodings[variant]
        return image[:, :: image.shape[1] // self.num_frames]

    @cached_property
    def projections(self) -> tuple[Tensor, Tensor]:
        """Projected CLS of the complete caption and of the complete image before fusion, (B, E) each, computed once."""
        return self.network.project(self.unimodal_text_cls(), self.unimodal_image_cls())


def _read(tokens_by_view: dict[str, dict[str, Tensor]], view: View, tokens: str) -> Tensor:
    kinds = tokens_by_view.get(view.name, {})
    if tokens not in kinds:
        raise ValueError(f"{tokens!r} of view {view.name!r} is not computed; list it in the objective's outputs")
    return kinds[tokens]
