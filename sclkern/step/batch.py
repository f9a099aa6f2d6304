"""The batch of a step: checked before any work is done, and with the tokens of captions first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sclkern.models.captions import Captions, check_captions, tokens_first
from sclkern.models.config import SCLConfig
from sclkern.objectives.config import ObjectiveConfig
from sclkern.ops.dispatch import may_read

CAPTIONS = ("text_ids", "text_mask")
# What goes with "place" alone.
WITH_PLACE = ("match_labels", "false_place")
# The masks of patches and tokens have ids for as many.
MAX_PLACE = 2**32


def prepare_batch(config: SCLConfig, objectives: ObjectiveConfig, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check a batch, and move the padding of captions behind their tokens.

    Args:
        config: of the network.
        objectives: the recipe.
        batch: as ``SCLModel.forward`` takes it.

    Returns:
        The batch with a bool ``text_mask``, True and then False in each row; with places, without false images that
        the recipe does not read.

    Raises:
        TypeError: an entry is no tensor, or of another dtype.
        ValueError: see ``check_step``.
    """
    brought = brings_false_images(objectives, batch)
    images = ("image", "false_image") if brought else ("image",)
    for name in (*images, *CAPTIONS):
        if name not in batch:
            raise ValueError(f"batch: got keys {sorted(map(str, batch))}, expected {name!r} too")
    _check_images({name: batch[name] for name in images}, config)
    captions = check_captions(batch["text_ids"], batch["text_mask"], config, CAPTIONS)
    rows = captions.mask.shape[0]
    batch = _without_unread(objectives, batch, brought)
    placed = check_places(batch, rows, captions.mask.device)
    _check_image_ids(batch, rows, captions.mask.device)
    of_all_rows = images[:1] if placed else images
    if any(batch[name].shape[0] != rows for name in of_all_rows):
        all_rows = {name: batch[name].shape[0] for name in (*of_all_rows, *CAPTIONS)}
        raise ValueError(f"batch: got different numbers of rows {all_rows}, expected one")
    if rows < 2 and objectives.in_batch_negatives and not brought:
        raise ValueError(
            f"batch: got {rows} row, expected at least 2 for itm_negatives={objectives.itm_negatives!r} "
            "(a negative image is another row's); use itm_negatives='dataset'"
        )
    for name in images:
        if batch[name].device != captions.mask.device:
            devices = {key: str(value.device) for key, value in batch.items() if isinstance(value, Tensor)}
            raise ValueError(f"batch: got devices {devices}, expected one")
    if "text_tokens" in batch:
        _check_room(batch["text_tokens"], captions.tokens, rows)
    return _in_order(batch, captions)


def brings_false_images(objectives: ObjectiveConfig, batch: Mapping[str, Any]) -> bool:
    """Whether a step reads ``false_image`` of a batch.

    Args:
        objectives: the recipe.
        batch: as ``SCLModel.forward`` takes it.

    Returns:
        Whether the recipe has negatives from the data set; or from the batch, and the loader decoded those of a global
        batch, of which this batch is a part.
    """
    if objectives.dataset_negatives:
        return True
    given = "place" in batch and "false_image" in batch
    return given and objectives.in_batch_negatives and not objectives.hard_negatives


def _without_unread(objectives: ObjectiveConfig, batch: Mapping[str, Any], brought: bool) -> Mapping[str, Any]:
    """A batch with places, without the false images that no objective of the recipe reads."""
    unread = set() if brought else {"false_image"}
    if brought or not objectives.in_batch_negatives or objectives.hard_negatives:
        unread.add("false_place")
    if "place" not in batch or unread.isdisjoint(batch):
        return batch
    return {name: value for name, value in batch.items() if name not in unread}


def check_places(batch: Mapping[str, Any], rows: int, device: torch.device) -> bool:
    """Raise for places in the global batch, labels and false images that no step takes.

    Args:
        batch: as ``SCLModel.forward`` takes it.
        rows: of the batch.
        device: of the batch.

    Returns:
        Whether the batch has places.
    """
    if "place" not in batch:
        for name in WITH_PLACE:
            if name in batch:
                raise ValueError(f"{name}: got it without 'place', expected the place of each row in the global batch")
        return False
    for name in ("place", *WITH_PLACE):
        if name in batch:
            _check_integers(name, batch[name], None if name == "false_place" else rows, device)
    negatives = {name: len(batch[name]) for name in ("false_image", "false_place") if name in batch}
    if negatives and "match_labels" not in batch:
        raise ValueError(
            f"batch: got 'place' and {sorted(negatives)} without 'match_labels', expected the labels that say for "
            "which rows they are; draw them with sclkern.step.match_labels(seed, place)"
        )
    if may_read(batch["place"]):
        _check_place_values(batch, negatives)
    return True


def _check_image_ids(batch: Mapping[str, Any], rows: int, device: torch.device) -> None:
    if "image_id" in batch:
        _check_integers("image_id", batch["image_id"], rows, device)


def _check_integers(name: str, value: Any, rows: int | None, device: torch.device) -> None:
    """One integer for each row; for any number of rows with None."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: got {value.dtype}, expected torch.int64; give {name}.long()")
    if value.ndim != 1 or rows not in (None, len(value)):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected (B,) = ({rows},)")
    if value.device != device:
        raise ValueError(f"{name}: got device {value.device}, expected that of text_ids, {device}")


def _check_place_values(batch: Mapping[str, Any], negatives: Mapping[str, int]) -> None:
    place = batch["place"]
    lowest, highest = (int(bound) for bound in place.aminmax()) if len(place) else (0, 0)
    if lowest < 0 or highest >= MAX_PLACE:
        raise ValueError(f"place: got {lowest} to {highest}, expected 0 to {MAX_PLACE - 1}")
    if len(place.unique()) < len(place):
        raise ValueError("place: got equal places, expected one of its own for each row of the global batch")
    if "match_labels" not in batch:
        return
    labels = batch["match_labels"]
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            "match_labels: got other values than 0 and 1, expected 1 for the row's own image, 0 for a false"
        )
    false = int((labels == 0).sum())
    for name, rows in negatives.items():
        if rows != false:
            raise ValueError(
                f"{name}: got {rows} rows, expected one for each of the {false} rows whose match_labels are 0"
            )
    if "false_place" in batch:
        missing = ~torch.isin(batch["false_place"], place)
        if missing.any():
            raise ValueError(
                f"false_place: got {int(batch['false_place'][missing][0])}, which is no place of this micro-batch, "
                "expected false_image too, with a row for each; decode the image of that place"
            )


def _check_images(images: Mapping[str, Any], config: SCLConfig) -> None:
    size, frames = config.image_size, max(1, config.max_frames)
    first: tuple[int, ...] | None = None
    for name, image in images.items():
        if not isinstance(image, Tensor):
            raise TypeError(f"{name}: got {type(image).__name__}, expected a tensor")
        if not image.is_floating_point():
            raise TypeError(
                f"{name}: got {image.dtype}, expected a floating dtype; scale and normalise pixels as sclkern.data does"
            )
        shape = tuple(image.shape)
        if len(shape) not in (4, 5) or shape[-3:] != (3, size, size):
            raise ValueError(
                f"{name}: got shape {shape}, expected (B, 3, S, S) or (B, F, 3, S, S) with S = {size} (image_size); "
                "resize images, or build the model with another image_size"
            )
        if len(shape) == 5 and not 1 <= shape[1] <= frames:
            raise ValueError(f"{name}: got {shape[1]} frames, expected 1 to {frames} (max_frames of the model)")
        if shape[1:] != (first or shape)[1:]:
            raise ValueError(f"{name}: got shape {shape}, expected that of image, {first}")
        first = first or shape


def _check_room(room: Any, tokens: int | None, rows: int) -> None:
    if isinstance(room, Tensor | bool | float) or not hasattr(room, "__index__"):
        raise TypeError(f"text_tokens: got {type(room).__name__}, expected an int, which the host knows")
    # Captions that do not fit would lose tokens in silence.
    if tokens is not None and tokens > room:
        raise ValueError(f"batch: got text_tokens {room}, expected room for the {tokens} of text_mask")
    if room < rows:
        raise ValueError(f"batch: got text_tokens {room}, expected room for a token of each of {rows} captions")


def with_tokens_first(batch: Mapping[str, Any], config: SCLConfig) -> Mapping[str, Any]:
    """A batch whose captions have their tokens before their padding, as masks and packed tokens need them.

    Args:
        batch: with ``text_ids`` and ``text_mask``.
        config: of the network.

    Returns:
        The batch with a bool ``text_mask``; captions are moved where padding is not known to stand last.

    Raises:
        TypeError: see ``check_captions``.
        ValueError: see ``check_captions``.
    """
    return _in_order(batch, check_captions(batch["text_ids"], batch["text_mask"], config, CAPTIONS))


def _in_order(batch: Mapping[str, Any], captions: Captions) -> Mapping[str, Any]:
    ids, mask = batch["text_ids"], captions.mask
    if captions.in_order:
        return batch if mask is batch["text_mask"] else {**batch, "text_mask": mask}
    ids, mask = tokens_first(ids, mask)
    return {**batch, "text_ids": ids, "text_mask": mask}


def unread_fault(batch: Mapping[str, Any]) -> Tensor | None:
    """What stands for the checks of values that cannot be read without waiting for the device.

    Args:
        batch: of ``with_tokens_first``.

    Returns:
        0-d, NaN if a caption has no token, ``text_tokens`` is too small, or false images are not those of the labels,
        else 0; None if values were checked.
    """
    mask = batch["text_mask"]
    if may_read(mask):
        return None
    right = mask.any(1).all()
    if "text_tokens" in batch:
        right = right & (mask.sum() <= batch["text_tokens"])
    for name in ("false_image", "false_place"):
        if "match_labels" in batch and name in batch:
            right = right & ((batch["match_labels"] == 0).sum() == len(batch[name]))
    if "false_place" in batch and "false_image" not in batch:
        right = right & (batch["false_place"][:, None] == batch["place"]).any(1).all()
    return torch.where(right, 0.0, torch.nan)
