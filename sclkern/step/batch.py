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


def prepare_batch(config: SCLConfig, objectives: ObjectiveConfig, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check a batch, and move the padding of captions behind their tokens.

    Args:
        config: of the network.
        objectives: the recipe.
        batch: as ``SCLModel.forward`` takes it.

    Returns:
        The batch with a bool ``text_mask``, True and then False in each row.

    Raises:
        TypeError: an entry is no tensor, or of another dtype.
        ValueError: see ``check_step``.
    """
    images = ("image", "false_image") if objectives.dataset_negatives else ("image",)
    for name in (*images, *CAPTIONS):
        if name not in batch:
            raise ValueError(f"batch: got keys {sorted(map(str, batch))}, expected {name!r} too")
    _check_images({name: batch[name] for name in images}, config)
    captions = check_captions(batch["text_ids"], batch["text_mask"], config, CAPTIONS)
    rows = captions.mask.shape[0]
    if any(batch[name].shape[0] != rows for name in images):
        all_rows = {name: batch[name].shape[0] for name in (*images, *CAPTIONS)}
        raise ValueError(f"batch: got different numbers of rows {all_rows}, expected one")
    if rows < 2 and objectives.in_batch_negatives:
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
        0-d, NaN if a caption has no token or ``text_tokens`` is too small, else 0; None if values were checked.
    """
    mask = batch["text_mask"]
    if may_read(mask):
        return None
    right = mask.any(1).all()
    if "text_tokens" in batch:
        right = right & (mask.sum() <= batch["text_tokens"])
    return torch.where(right, 0.0, torch.nan)
