"""Every random choice of a step, drawn on the batch's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from sclkern.models.config import SCLConfig
from sclkern.objectives._common import completed_tokens
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
        false_rows: (B,) int64, the row of the batch whose image each row is matched with, where the batch says so.
        image_id: (B,) int64, equal where rows show the same picture, where the batch says so.
        place: (B,) int64, of each row in the global batch, where the batch says so.
        seed: of the step, from which modules with dropout derive theirs; read only with ``place``.
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
    false_rows: Tensor | None = None
    image_id: Tensor | None = None
    place: Tensor | None = None
    seed: int | Tensor | None = None

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
        "completion": completed_tokens(text_length, objectives.text_mask_ratio),
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
        batch: ``text_ids`` (B, L) int64 and ``text_mask`` (B, L); with ``place`` (B,) int64, each row draws by its
            place in the global batch in place of its index, and the labels and places of false images may be given, as
            ``SCLModel.forward`` takes them.
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
    ids = batch["text_ids"]
    rows, device = ids.shape[0], ids.device
    needed, capacity = needed_masks(objectives), token_capacity(config, objectives, ids.shape[1])
    place = batch.get("place")
    masks = StepMasks(image_id=batch.get("image_id"), place=place, seed=seed)
    keyed: dict[str, Any] = {"seed": seed, "row_ids": place}
    if "dropped" in needed:
        kept = 1 - objectives.image_mask_ratio
        masks.keep = select_patches(config.num_patches, kept, rows, **keyed, device=device)
    if "token_masked" in needed:
        ratio = objectives.patch_token_ratio
        masks.replace = select_tokens(config.num_patches, ratio, rows, **keyed, device=device)
        masks.replace_capacity = capacity["replaced"]
    if "mlm" in needed:
        masks.mlm, masks.mlm_capacity = draw_text("mlm", config, objectives, batch, seed), capacity["mlm"]
    if "completion" in needed:
        masks.completion = draw_text("completion", config, objectives, batch, seed)
        masks.completion_capacity = capacity["completion"]
    if "matching" in needed:
        if place is None:
            keys, order = random_words((rows, 1), seed=seed, stream=STREAM_ITM, device=device)[:2]
            every_row = torch.ones_like(order.T, dtype=torch.bool)
            masks.itm_labels = smallest(order.T, every_row, rows // 2)[0].long()
            masks.itm_keys = keys[:, 0]
            masks.num_negatives = rows - rows // 2
        else:
            _match_by_place(masks, batch, place, seed)
    return masks


def draw_text(
    kind: Literal["mlm", "completion"],
    config: SCLConfig,
    objectives: ObjectiveConfig,
    batch: Mapping[str, Any],
    seed: int | Tensor,
) -> MaskedText:
    """Draw one mask of the captions.

    Args:
        kind: which.
        config: token ids of the network.
        objectives: ratios, and how masks are drawn.
        batch: of ``with_tokens_first``.
        seed: as in ``draw_masks``.

    Returns:
        The masked captions.
    """
    mlm = kind == "mlm"
    return mask_text(
        batch["text_ids"],
        batch["text_mask"].sum(1),
        kind=kind,
        ratio=objectives.mlm_ratio if mlm else objectives.text_mask_ratio,
        mask_id=config.mask_id,
        vocab_size=config.vocab_size,
        seed=seed,
        row_ids=batch.get("place"),
        published=(objectives.mlm_mask if mlm else objectives.text_mask) == "published",
    )


def _match_by_place(masks: StepMasks, batch: Mapping[str, Any], place: Tensor, seed: int | Tensor) -> None:
    """The part of ``draw_prepared`` that says which image each row is matched with."""
    labels = batch.get("match_labels")
    masks.itm_labels = match_labels(seed, place) if labels is None else labels
    masks.itm_keys = random_words((len(place), 1), seed=seed, stream=STREAM_ITM, device=place.device, row_ids=place)[0][
        :, 0
    ]
    if "false_image" in batch:
        masks.num_negatives = len(batch["false_image"])
    elif "false_place" in batch:
        masks.num_negatives = len(batch["false_place"])
        chosen = (batch["false_place"][:, None] == place).to(torch.uint8).argmax(1)
        own = torch.arange(len(place), device=place.device)
        masks.false_rows = own.index_copy(0, masks.negative_rows, chosen)


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
    """Choose a negative image for each row: another row of the batch that shows another picture.

    A row is followed by the next, and the last by the first. Without ``image_id`` every row is taken to show a picture
    of its own, and so is a row where all show the same: then its negative image is another row's, whatever it shows.

    Args:
        masks: ``itm_keys``, and ``image_id`` where it is known.
        similarity: (B, B) text to image, cosine over temperature: the choice has probability softmax over the rows
            of other pictures (the hard negatives of ALBEF, arXiv 2107.07651); None draws another row uniformly, and
            takes the next one of another picture from there on.

    Returns:
        (B,) int64 rows.
    """
    keys = drawn(masks.itm_keys, "itm_keys")
    rows = keys.shape[0]
    row = torch.arange(rows, device=keys.device)
    if similarity is None:
        chosen = (row + 1 + below(keys, rows - 1)) % rows
        if masks.image_id is None:
            return chosen
    allowed = row[:, None] != row
    if masks.image_id is not None:
        different = masks.image_id[:, None] != masks.image_id
        allowed &= different | ~different.any(1, keepdim=True)
    if similarity is not None:
        chances = similarity.detach().float().masked_fill(~allowed, -torch.inf).softmax(-1).cumsum(-1)
        point = keys.double() * 2.0**-32 * chances[:, -1].double()
        # Rounding can land on an image that is not allowed, whose share is zero.
        chosen = torch.searchsorted(chances.double(), point[:, None], right=True)[:, 0].clamp_max(rows - 1)
    following = (chosen[:, None] + row) % rows
    first = allowed.gather(1, following).to(torch.uint8).argmax(1, keepdim=True)
    return following.gather(1, first)[:, 0]
