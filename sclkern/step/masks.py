"""Every random choice of a step, drawn on the batch's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sclkern.ops.masking import mask_text, select_patches, select_tokens
from sclkern.random import STREAM_ITM, below, random_words, smallest
from sclkern.reference import MaskedText

if TYPE_CHECKING:
    from sclkern.model import SCLModel


@dataclass
class StepMasks:
    """Every random choice of a step. B batch, L text length, K kept patches, P patches.

    Attributes:
        keep: (B, K) int64, patches the dropped image keeps.
        replace: (B, P) bool, patches the token-masked image replaces; None without MLTC.
        mlm: text with words to predict. completion: text with words to complete.
        mlm_capacity, completion_capacity, replace_capacity: at most this many positions of a row are selected.
        itm_labels: (B,) int64, 1 = the true image.
        itm_keys: (B,) int64 words that choose the false image in the batch.
        itm_false: how many labels are 0.
    """

    keep: Tensor
    replace: Tensor | None
    mlm: MaskedText
    completion: MaskedText
    mlm_capacity: int
    completion_capacity: int
    replace_capacity: int
    itm_labels: Tensor
    itm_keys: Tensor
    itm_false: int

    @property
    def false_rows(self) -> Tensor:
        """(itm_false,) int64, the rows whose label is 0."""
        return self.itm_labels.argsort(stable=True)[: self.itm_false]


def draw_masks(model: SCLModel, batch: Mapping[str, Tensor], seed: int | Tensor) -> StepMasks:
    """Draw the masks of a step on the batch's device, without a loop over the batch and without reading back."""
    config, objectives = model.config, model.objectives
    ids, mask = batch["text_ids"], batch["text_mask"]
    device, (rows, width) = ids.device, ids.shape
    lengths = mask.long().sum(1)
    common = {"mask_id": config.mask_id, "vocab_size": config.vocab_size, "seed": seed}
    words = max(width - 2, 0)
    keys, order = random_words((rows, 1), seed=seed, stream=STREAM_ITM, device=device)[:2]
    return StepMasks(
        keep=select_patches(config.num_patches, 1 - objectives.image_mask_ratio, rows, seed=seed, device=device),
        replace=select_tokens(config.num_patches, objectives.patch_token_ratio, rows, seed=seed, device=device)
        if "mltc" in objectives.tasks
        else None,
        mlm=mask_text(
            ids, lengths, kind="mlm", ratio=objectives.mlm_ratio, published=objectives.mlm_mask == "reference", **common
        ),
        completion=mask_text(
            ids,
            lengths,
            kind="completion",
            ratio=objectives.text_mask_ratio,
            published=objectives.text_mask == "reference",
            **common,
        ),
        mlm_capacity=min(width, int(width * objectives.mlm_ratio) + 1),
        completion_capacity=min(width, int(words * objectives.text_mask_ratio) + 1),
        replace_capacity=int(config.num_patches * objectives.patch_token_ratio),
        itm_labels=smallest(order.T, torch.ones_like(order.T, dtype=torch.bool), rows // 2)[0].long(),
        itm_keys=keys[:, 0],
        itm_false=rows - rows // 2,
    )


def selected_positions(selected: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The selected columns of each row with room for ``capacity``: a static shape, so nothing is read back.

    Args:
        selected: (B, L) bool with at most ``capacity`` True in a row.

    Returns:
        positions (B, capacity) int64, ascending, and valid (B, capacity) bool.
    """
    positions = (~selected).to(torch.uint8).argsort(dim=1, stable=True)[:, :capacity]
    return positions, selected.gather(1, positions)


def negative_images(masks: StepMasks, similarity: Tensor | None) -> Tensor:
    """Index (B,) of a false image for each row: another row of the batch, uniform or, with a (B, B) text-to-image
    ``similarity`` (cosine / temperature), with probability softmax over the other rows (ALBEF's hard negatives).

    Another row may hold the same picture with another of its captions: rare in a batch of a large set, and let be.
    """
    rows = masks.itm_labels.shape[0]
    own = torch.arange(rows, device=masks.itm_labels.device)
    if similarity is None:
        return (own + 1 + below(masks.itm_keys, rows - 1)) % rows
    chances = similarity.detach().float().masked_fill(own[:, None] == own, -torch.inf).softmax(-1).cumsum(-1)
    point = masks.itm_keys.double() * 2.0**-32 * chances[:, -1].double()
    chosen = torch.searchsorted(chances.double(), point[:, None], right=True)[:, 0].clamp_max(rows - 1)
    # Rounding can land on the row's own, whose share is zero.
    return torch.where(chosen == own, (own + 1) % rows, chosen)
