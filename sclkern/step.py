"""The training step: which masks are drawn, which views are fused, which loss reads what.

A view is an (image variant, text variant) pair that goes through the fusion encoder. Passes of recipe "scl":
ITM (image or false image, text), MLM (image, mlm text), A (dropped image, text), B (image, completion-masked text);
"glscl" adds C (token-masked image, text). MVSC recovers the image CLS in A and finds it in B; MLSC recovers the text
CLS in B and finds it in A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sclkern.errors import UserError
from sclkern.objectives import losses as L
from sclkern.random import STREAM_ITM, below, random_words, smallest
from sclkern.reference import MaskedText, mask_text, select_patches, select_tokens

if TYPE_CHECKING:
    from sclkern.models.config import SCLConfig
    from sclkern.models.scl import FusedFeatures, SCLModel
    from sclkern.objectives.config import ObjectiveConfig


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


@dataclass
class SCLLosses:
    """Losses of a step, 0-d float32 tensors with their graph; None where the recipe has no such objective.

    Attributes:
        total: the weighted sum. itc: both directions summed, before its weight; mltc: both modalities summed, before
            its weight.
        metrics: detached 0-d tensors, still on the device.
    """

    total: Tensor
    itm: Tensor | None = None
    mlm: Tensor | None = None
    itc: Tensor | None = None
    mvsc: Tensor | None = None
    mlsc: Tensor | None = None
    mltc: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """The losses that exist, by name, ``total`` first."""
        names = ("total", "itm", "mlm", "itc", "mvsc", "mlsc", "mltc")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


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
            ids, lengths, kind="mlm", ratio=objectives.mlm_ratio, reference=objectives.mlm_mask == "reference", **common
        ),
        completion=mask_text(
            ids,
            lengths,
            kind="completion",
            ratio=objectives.text_mask_ratio,
            reference=objectives.text_mask == "reference",
            **common,
        ),
        mlm_capacity=min(width, int(width * objectives.mlm_ratio) + 1),
        completion_capacity=min(width, int(words * objectives.text_mask_ratio) + 1),
        replace_capacity=int(config.num_patches * objectives.patch_token_ratio),
        itm_labels=smallest(order.T, torch.ones_like(order.T, dtype=torch.bool), rows // 2)[0].long(),
        itm_keys=keys[:, 0],
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


def take_rows(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, L, D) at positions (B, K): (B, K, D)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def negative_images(model: SCLModel, masks: StepMasks, similarity: Tensor | None) -> Tensor:
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


def run_step(model: SCLModel, batch: Mapping[str, Tensor], masks: StepMasks) -> SCLLosses:
    """Losses of one step from given masks, each view in a pass of its own.

    Raises:
        ValueError: a head or input that an objective needs is missing, or a batch too small for in-batch negatives.
    """
    objectives = model.objectives
    check_step(model, batch)
    image, ids, mask = batch["image"], batch["text_ids"], batch["text_mask"].bool()
    cache: dict = {}

    def encoded(name: str, encode):
        if objectives.encodings != "shared":
            return encode()
        if name not in cache:
            cache[name] = encode()
        return cache[name]

    def text(name: str = "complete", text_ids: Tensor = ids) -> Tensor:
        return encoded("text." + name, lambda: model.encode_text(text_ids, mask))

    def picture(name: str = "complete", pixels: Tensor = image, **masking):
        return encoded("image." + name, lambda: model.encode_image(pixels, **masking))

    out = SCLLosses(total=torch.zeros((), device=ids.device))
    contrast = model.project(text(), picture())
    out.itc = L.image_text_contrast(contrast[1], contrast[0], model.contrast_temperature(), gather=objectives.gather)

    out.itm, out.metrics["itm_accuracy"] = _matching(model, batch, masks, text, picture, contrast)

    mlm = model.fuse(text("mlm", masks.mlm.ids), mask, picture())
    positions, valid = selected_positions(masks.mlm.selected, masks.mlm_capacity)
    labels = torch.where(valid, ids.gather(1, positions), -100)
    logits = model.mlm_head(take_rows(mlm.text, positions))
    out.mlm = L.masked_language_modeling(logits, labels, objectives.empty_selections)
    hits = (logits.detach().argmax(-1) == labels).sum()
    out.metrics["mlm_accuracy"] = hits / valid.sum().clamp_min(1)

    masked_image = model.fuse(text(), mask, picture("dropped", keep=masks.keep))
    masked_text = model.fuse(text("completion", masks.completion.ids), mask, picture())
    options = {
        "temperature": objectives.temperature,
        "directions": objectives.directions,
        "gather": objectives.gather,
    }
    out.mvsc = L.masked_vision_semantic_completion(
        masked_image.image.cls,
        masked_text.image.cls,
        # The published code normalises over frames for clips alone; an image's features would all become signs.
        frame_norm=objectives.frame_norm if masked_image.image.num_frames > 1 else "features",
        **options,
    )
    options["negatives"] = objectives.negatives
    out.mlsc = L.masked_language_semantic_completion(masked_text.text_cls, masked_image.text_cls, **options)
    if "mltc" in objectives.tasks:
        token_masked = model.fuse(text(), mask, picture("token_masked", replace=masks.replace))
        parts = _local_completion(model, masks, masked_image, masked_text, token_masked, options)
        out.mltc = sum(parts.values())
        out.metrics.update({name: part.detach() for name, part in parts.items()})

    out.total = out.itm + out.mlm + objectives.itc_weight * out.itc + out.mvsc + out.mlsc
    if out.mltc is not None:
        out.total = out.total + objectives.mltc_weight * out.mltc
    out.metrics["itc_temperature"] = model.contrast_temperature().detach()
    return out


def _matching(model: SCLModel, batch, masks: StepMasks, text, picture, contrast) -> tuple[Tensor, Tensor]:
    own = masks.itm_labels.bool()
    if model.objectives.dataset_negatives:
        pixels = torch.where(own.view(-1, *[1] * (batch["image"].ndim - 1)), batch["image"], batch["false_image"])
        features = picture("matching", pixels)
    else:
        similarity = None
        if model.objectives.itm_negatives == "hard":
            unit = [torch.nn.functional.normalize(x.detach().float(), dim=-1) for x in contrast]
            similarity = unit[0] @ unit[1].T / model.contrast_temperature()
        index = torch.where(own, torch.arange(len(own), device=own.device), negative_images(model, masks, similarity))
        features = picture()
        features = features.with_tokens(features.tokens[index])
    logits = model.itm_head(model.pool(model.fuse(text(), batch["text_mask"], features)))
    accuracy = (logits.detach().argmax(-1) == masks.itm_labels).float().mean()
    return L.image_text_matching(logits, masks.itm_labels), accuracy


def _local_completion(
    model: SCLModel,
    masks: StepMasks,
    masked_image: FusedFeatures,
    masked_text: FusedFeatures,
    token_masked: FusedFeatures,
    options: dict,
) -> dict[str, Tensor]:
    """MLTC of words and of patches; for clips the replaced tubes count once a frame (the published code has images
    alone)."""
    empty = model.objectives.empty_selections
    positions, valid = selected_positions(masks.completion.selected, masks.completion_capacity)
    frames = token_masked.image.num_frames
    places, present = selected_positions(masks.replace, masks.replace_capacity)
    offset = torch.arange(frames, device=places.device)[:, None] * masks.replace.shape[1]
    places, present = (places[:, None] + offset).flatten(1), present[:, None].expand(-1, frames, -1).flatten(1)
    parts = {
        "mltc_image": L.masked_local_token_completion(
            take_rows(token_masked.image.patches, places),
            take_rows(masked_text.image.patches, places),
            present,
            empty=empty,
            **options,
        ),
        "mltc_text": L.masked_local_token_completion(
            take_rows(masked_text.text, positions),
            take_rows(masked_image.text, positions),
            valid,
            empty=empty,
            **{**options, "negatives": "all"},
        ),
    }
    if empty == "reference":
        parts = {name: torch.zeros_like(part) if torch.isnan(part) else part for name, part in parts.items()}
    return parts


def check_objectives(config: SCLConfig, objectives: ObjectiveConfig) -> None:
    """Raise a ``UserError`` that names what a model of this size lacks for these objectives."""
    if lacking := {"itm", "mlm", "itc"} - set(config.heads):
        raise UserError(f"heads: got {list(config.heads)}, recipe {objectives.recipe!r} needs {sorted(lacking)} too")
    if "mltc" in objectives.tasks and not config.patch_mask_token:
        raise UserError(f"patch_mask_token: the model has none, recipe {objectives.recipe!r} needs it")


def check_step(model: SCLModel, batch: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` that names what a step lacks, before any work is done."""
    objectives = model.objectives
    check_objectives(model.config, objectives)
    needed = ["image", "text_ids", "text_mask"] + ["false_image"] * objectives.dataset_negatives
    for name in needed:
        if name not in batch:
            raise ValueError(f"batch: got keys {sorted(batch)}, expected {name!r} too")
    rows = {name: batch[name].shape[0] for name in needed}
    if len(set(rows.values())) > 1:
        raise ValueError(f"batch: got different numbers of rows {rows}, expected one")
    if not objectives.dataset_negatives and rows["image"] < 2:
        raise ValueError(
            f"batch: got {rows['image']} row, expected at least 2 for itm_negatives={objectives.itm_negatives!r} "
            "(a false image is another row's); use itm_negatives='dataset'"
        )
