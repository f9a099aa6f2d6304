"""Every random choice of a step, drawn on the batch's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sclkern.models.config import SCLConfig
from sclkern.objectives.config import ObjectiveConfig
from sclkern.ops.masking import mask_text, select_patches, select_tokens
from sclkern.random import STREAM_FALSE_PLACES, STREAM_ITM, STREAM_MATCHES, below, philox, random_words, smallest
from sclkern.reference import MaskedText
from sclkern.step.batch import with_tokens_first

T = TypeVar("T")


@dataclass
class StepMasks:
    """Every random choice of a step; None where no objective of the recipe needs it. B batch, L text length, K kept
    patches, P patches.

    Attributes:
        keep: (B, K) int64, the patches that the dropped image keeps.
        replace: (B, P) bool, the patches that the token-masked image replaces.
        mlm: the text with tokens to predict.
        completion: the text with tokens to complete.
        mlm_capacity: the most tokens to predict in a row.
        completion_capacity: the most tokens to complete in a row.
        replace_capacity: the most patches replaced in a row.
        itm_labels: (B,) int64, 1 = the row's own image.
        itm_keys: (B,) int64 random words that choose the negative image in the batch.
        num_negatives: how many labels are 0.
    """

    keep: Tensor | None = None
    replace: Tensor | None = None
    mlm: MaskedText | None = None
    completion: MaskedText | None = None
    mlm_capacity: int = 0
    completion_capacity: int = 0
    replace_capacity: int = 0
    itm_labels: Tensor | None = None
    itm_keys: Tensor | None = None
    num_negatives: int = 0

    @property
    def negative_rows(self) -> Tensor:
        """(num_negatives,) int64, the rows whose label is 0."""
        return drawn(self.itm_labels, "itm_labels").argsort(stable=True)[: self.num_negatives]


def drawn(mask: T | None, name: str) -> T:
    """Return a mask that a plan needs.

    Args:
        mask: a field of ``StepMasks``.
        name: of the field.

    Returns:
        The mask.

    Raises:
        ValueError: it is None: the masks belong to another recipe.
    """
    if mask is None:
        raise ValueError(f"masks.{name}: got None, expected a mask; draw the masks for the recipe of the step")
    return mask


def token_capacity(config: SCLConfig, objectives: ObjectiveConfig, text_length: int) -> dict[str, int]:
    """The most tokens of each kind that a sample can have.

    Args:
        config: the number of patches.
        objectives: the ratios.
        text_length: padded length of the captions.

    Returns:
        By kind of ``sclkern.objectives.views``; "replaced" is that of one frame.
    """
    return {
        "cls": 1,
        "mlm": min(text_length, int(text_length * objectives.mlm_ratio) + 1),
        "completion": min(text_length, int(max(text_length - 2, 0) * objectives.text_mask_ratio) + 1),
        "replaced": int(config.num_patches * objectives.patch_token_ratio),
    }


def match_labels(seed: int | Tensor, place: Tensor) -> Tensor:
    """Draw which rows of a global batch keep their own image in the view of ITM.

    Of the places 2 i and 2 i + 1 exactly one has a false image. A label depends on (seed, place) alone, so that any
    part of the global batch draws its own.

    Args:
        seed: of the step (``sclkern.random.step_seed``): int, or int64 tensor of one element on the device of place.
        place: (B,) int64, places in the global batch.

    Returns:
        (B,) int64, 1 = the row's own image, 0 = a false one.
    """
    words = philox(seed, place >> 1, STREAM_MATCHES)[0]
    return ((words ^ place) & 1) ^ 1


def false_places(seed: int | Tensor, place: Tensor, global_batch: int) -> Tensor:
    """Draw the place whose image is the false image of each place: any other of the global batch, uniformly.

    Args:
        seed: as in ``match_labels``.
        place: (N,) int64, places in the global batch; of the rows whose label is 0.
        global_batch: rows of the global batch, at least 2.

    Returns:
        (N,) int64, each in [0, global_batch) and not the place itself; a function of (seed, place, global_batch).

    Raises:
        ValueError: ``global_batch`` is below 2.
    """
    if global_batch < 2:
        raise ValueError(
            f"global_batch: got {global_batch}, expected at least 2 (a false image is another row's); raise the batch "
            "size, or use itm_negatives='dataset'"
        )
    words = philox(seed, place, STREAM_FALSE_PLACES)[0]
    return (place + 1 + below(words, global_batch - 1)) % global_batch


def needed_masks(objectives: ObjectiveConfig) -> set[str]:
    """Which masks the objectives of a recipe need, by what they read.

    Args:
        objectives: the recipe.

    Returns:
        Some of "dropped", "token_masked", "matching" (variants of images), "mlm" and "completion" (of texts).
    """
    needed: set[str] = set()
    for objective in objectives.selected:
        needed.update(objective.unimodal_images, objective.unimodal_texts)
        for outputs in objective.outputs:
            needed.update((outputs.view.image, outputs.view.text), outputs.text)
            # The positions of replaced patches are read of views that replace none, too.
            needed.update({"token_masked"} if "replaced" in outputs.image else ())
    return needed - {"complete", "cls"}


def draw_masks(
    config: SCLConfig, objectives: ObjectiveConfig, batch: Mapping[str, Any], seed: int | Tensor
) -> StepMasks:
    """Draw the masks that a recipe needs, on the batch's device, without a loop over the batch or a value read back.

    Args:
        config: sizes and token ids of the network.
        objectives: the recipe and its ratios.
        batch: ``text_ids`` (B, L) int64 and ``text_mask`` (B, L).
        seed: int or int64 tensor, the key of every mask.

    Returns:
        The masks. A mask does not depend on which others are drawn, nor on where captions are padded: those of texts
        have the tokens of each caption first.

    Raises:
        TypeError: captions of another dtype.
        ValueError: captions that no step takes.
    """
    return draw_prepared(config, objectives, with_tokens_first(batch, config), seed)


def draw_prepared(
    config: SCLConfig, objectives: ObjectiveConfig, batch: Mapping[str, Any], seed: int | Tensor
) -> StepMasks:
    """``draw_masks`` for a batch of ``with_tokens_first``.

    Args:
        config: as in ``draw_masks``.
        objectives: as in ``draw_masks``.
        batch: of ``with_tokens_first``.
        seed: as in ``draw_masks``.

    Returns:
        The masks.
    """
    ids, lengths = batch["text_ids"], batch["text_mask"].sum(1)
    rows, device = ids.shape[0], ids.device
    needed, capacity = needed_masks(objectives), token_capacity(config, objectives, ids.shape[1])
    masks = StepMasks()
    if "dropped" in needed:
        kept = 1 - objectives.image_mask_ratio
        masks.keep = select_patches(config.num_patches, kept, rows, seed=seed, device=device)
    if "token_masked" in needed:
        ratio = objectives.patch_token_ratio
        masks.replace = select_tokens(config.num_patches, ratio, rows, seed=seed, device=device)
        masks.replace_capacity = capacity["replaced"]
    mask_id, vocab_size = config.mask_id, config.vocab_size
    if "mlm" in needed:
        masks.mlm = mask_text(
            ids,
            lengths,
            kind="mlm",
            ratio=objectives.mlm_ratio,
            mask_id=mask_id,
            vocab_size=vocab_size,
            seed=seed,
            published=objectives.mlm_mask == "published",
        )
        masks.mlm_capacity = capacity["mlm"]
    if "completion" in needed:
        masks.completion = mask_text(
            ids,
            lengths,
            kind="completion",
            ratio=objectives.text_mask_ratio,
            mask_id=mask_id,
            vocab_size=vocab_size,
            seed=seed,
            published=objectives.text_mask == "published",
        )
        masks.completion_capacity = capacity["completion"]
    if "matching" in needed:
        keys, order = random_words((rows, 1), seed=seed, stream=STREAM_ITM, device=device)[:2]
        every_row = torch.ones_like(order.T, dtype=torch.bool)
        masks.itm_labels = smallest(order.T, every_row, rows // 2)[0].long()
        masks.itm_keys = keys[:, 0]
        masks.num_negatives = rows - rows // 2
    return masks


def selected_positions(selected: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The selected columns of each row, with room for ``capacity``: a static shape, so nothing is read back.

    Args:
        selected: (B, L) bool with at most ``capacity`` True in a row.
        capacity: the number of columns returned.

    Returns:
        positions (B, capacity) int64, ascending, and valid (B, capacity) bool.
    """
    positions = (~selected).to(torch.uint8).argsort(dim=1, stable=True)[:, :capacity]
    return positions, selected.gather(1, positions)


def negative_images(masks: StepMasks, similarity: Tensor | None) -> Tensor:
    """Choose a negative image for each row: another row of the batch.

    Another row may hold the same image with another of its captions: rare in a batch of a large set, and accepted.

    Args:
        masks: ``itm_labels`` and ``itm_keys``.
        similarity: (B, B) text to image, cosine over temperature: the choice has probability softmax over the other
            rows (the hard negatives of ALBEF, arXiv 2107.07651); None draws uniformly.

    Returns:
        (B,) int64 rows.
    """
    keys = drawn(masks.itm_keys, "itm_keys")
    rows = keys.shape[0]
    row = torch.arange(rows, device=keys.device)
    if similarity is None:
        return (row + 1 + below(keys, rows - 1)) % rows
    chances = similarity.detach().float().masked_fill(row[:, None] == row, -torch.inf).softmax(-1).cumsum(-1)
    point = keys.double() * 2.0**-32 * chances[:, -1].double()
    chosen = torch.searchsorted(chances.double(), point[:, None], right=True)[:, 0].clamp_max(rows - 1)
    # Rounding can land on the row's own image, whose share is zero.
    return torch.where(chosen == row, (row + 1) % rows, chosen)
