"""Execution of a plan: encode every variant, fuse every view, keep what the losses read.

B rows of the batch, L padded caption length, F frames, D width. Shapes follow from the plan and the batch's shapes, so
nothing is read back; packed texts have room for a given number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.models.fusion import OutputSelection, Section
from sclkern.models.layouts import Packed, Padded, Rows
from sclkern.models.network import IMAGE_TYPE, TEXT_TYPE
from sclkern.profiling import phase
from sclkern.step.masks import StepMasks, negative_images, selected_positions
from sclkern.step.plan import Plan, View

if TYPE_CHECKING:
    from sclkern.model import SCLModel


def pack(mask: Tensor, total: int) -> tuple[Tensor, Packed]:
    """Where to find the tokens of a padded (S, L) batch, sequence after sequence, with room for ``total`` of them.

    Returns:
        (total,) int64 indices into the flattened batch, each once; the last ones are padding when there is room left.
    """
    lengths = mask.sum(1, dtype=torch.int32)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    order = (~mask.flatten()).to(torch.uint8).argsort(stable=True)
    order = order[:total]
    return order, Packed(cu_seqlens, mask.shape[1], mask=mask, padded_index=order)


def uniform(parts: tuple[tuple[int, int], ...], num_frames: int, device: torch.device) -> Packed:
    """The layout of neighbours of equal length, (sequences, length) each."""
    starts, start = [], 0
    for sequences, length in parts:
        starts.append(torch.arange(sequences, dtype=torch.int32, device=device) * length + start)
        start += sequences * length
    starts.append(torch.full((1,), start, dtype=torch.int32, device=device))
    return Packed(torch.cat(starts), max(length for _, length in parts), parts, num_frames)


class Encoded(NamedTuple):
    """Attributes:
    texts: by encoding, (B, L, D); rows of padding are undefined.
    images: by encoding, (rows, F * (1 + P), D), frame by frame with each CLS first; P may differ.
    num_frames: F.
    """

    texts: dict[str, Tensor]
    images: dict[str, Tensor]
    num_frames: int


def encode(model: SCLModel, plan: Plan, batch: Mapping[str, Tensor], masks: StepMasks) -> Encoded:
    """Run both unimodal encoders on every variant of the plan, after the modality transforms."""
    with phase("image encoder"):
        images, num_frames = _encode_images(model, plan, batch, masks)
    with phase("text encoder"):
        return Encoded(_encode_texts(model, plan, batch, masks), images, num_frames)


def _encode_texts(model: SCLModel, plan: Plan, batch: Mapping[str, Tensor], masks: StepMasks) -> dict[str, Tensor]:
    ids, mask = batch["text_ids"], batch["text_mask"].bool()
    variants = {"complete": ids, "mlm": masks.mlm.ids, "completion": masks.completion.ids}
    if not plan.step.pack:
        return {each.name: model.encode_text(variants[each.variant], mask) for each in plan.texts}
    every = torch.cat([variants[each.variant] for each in plan.texts])
    order, layout = pack(mask.repeat(len(plan.texts), 1), len(plan.texts) * text_tokens(batch))
    positions = model.text.positions(every)
    tokens = model.text.encode(every.flatten()[order], positions.flatten()[order], layout)
    tokens = model.text_transform(tokens)
    padded = tokens.new_zeros(every.numel(), tokens.shape[-1]).index_copy(0, order, tokens)
    parts = padded.view(len(plan.texts), *ids.shape, -1).unbind(0)
    return {each.name: part for each, part in zip(plan.texts, parts, strict=True)}


def _encode_images(
    model: SCLModel, plan: Plan, batch: Mapping[str, Tensor], masks: StepMasks
) -> tuple[dict[str, Tensor], int]:
    def embedded(variant: str) -> tuple[Tensor, int]:
        picture = batch["image"]
        if variant == "false":
            picture = batch["false_image"].index_select(0, masks.false_rows)
        elif variant == "mixed":
            own = masks.itm_labels.bool().view(-1, *[1] * (picture.ndim - 1))
            picture = torch.where(own, picture, batch["false_image"])
        keep = masks.keep if variant == "dropped" else None
        return model.vision.embed(picture, keep=keep, replace=masks.replace if variant == "token_masked" else None)

    tokens, num_frames = zip(*(embedded(each.variant) for each in plan.images), strict=True)
    frames = num_frames[0]
    if plan.step.pack:
        layout = uniform(tuple(tuple(x.shape[:2]) for x in tokens), frames, tokens[0].device)
        packed = torch.cat([x.flatten(0, 1) for x in tokens])
        packed = model.image_transform(model.vision.encode(packed, layout))
        parts = packed.split([x.shape[0] * x.shape[1] for x in tokens])
        tokens = [part.view(x.shape) for part, x in zip(parts, tokens, strict=True)]
    else:
        layout = Padded(num_frames=frames)
        tokens = [model.image_transform(model.vision.encode(x, layout)) for x in tokens]
    return {each.name: x for each, x in zip(plan.images, tokens, strict=True)}, frames


def text_tokens(batch: Mapping[str, Tensor]) -> int:
    """Room for the tokens of the batch's captions: what the loader counted, else all padded places."""
    places = batch["text_ids"].numel()
    return min(int(batch.get("text_tokens", places)), places)


class Places(NamedTuple):
    """Where in a sequence the tokens stand that a loss reads, (B, K) int64 each, and which of them exist, (B, K) bool.

    Places that do not exist are those of some other token of the row.
    """

    index: dict[str, Tensor]
    valid: dict[str, Tensor]

    def joined(self, reads: tuple[str, ...]) -> Tensor:
        """(B, K): the places of all ``reads``, one after the other."""
        none = self.index["cls"][:, :0]
        return torch.cat([none, *(self.index[read] for read in reads)], dim=1)

    def split(self, tokens: Tensor, reads: tuple[str, ...]) -> dict[str, Tensor]:
        """tokens (B, K, D) at ``joined(reads)``, by read."""
        parts = tokens.split([self.index[read].shape[1] for read in reads], dim=1) if reads else ()
        return dict(zip(reads, parts, strict=True))


def text_places(masks: StepMasks, lengths: Tensor) -> Places:
    """Places of CLS, of words to predict and of words to complete. ``lengths``: (B,) tokens of each caption."""
    index, valid = {"cls": lengths.new_zeros((len(lengths), 1))}, {}
    for name, text, capacity in (
        ("mlm", masks.mlm, masks.mlm_capacity),
        ("completion", masks.completion, masks.completion_capacity),
    ):
        index[name], valid[name] = selected_positions(text.selected, capacity)
        # What fills the room must be a token: packed, the place after the last is another caption's.
        index[name] = torch.minimum(index[name], (lengths[:, None] - 1).clamp_min(0))
    return Places(index, valid)


def image_places(masks: StepMasks, num_frames: int, tokens: int) -> Places:
    """Places of the CLS tokens, and of replaced patches, which count once a frame (the published code has images
    alone). ``tokens``: of an image, CLS included."""
    frame = torch.arange(num_frames, device=masks.keep.device) * (tokens // num_frames)
    index = {"cls": frame.expand(masks.keep.shape[0], -1)}
    valid = {}
    if masks.replace is not None:
        places, present = selected_positions(masks.replace, masks.replace_capacity)
        index["replaced"] = (frame[:, None] + 1 + places[:, None]).flatten(1)
        valid["replaced"] = present[:, None].expand(-1, num_frames, -1).flatten(1)
    return Places(index, valid)


class Fused(NamedTuple):
    """What the losses read.

    Attributes:
        text, image: by view and read, (B, K, D).
        text_places: of every view. image_places: of views with all patches.
    """

    text: dict[str, dict[str, Tensor]]
    image: dict[str, dict[str, Tensor]]
    text_places: Places
    image_places: Places


def fuse(
    model: SCLModel,
    plan: Plan,
    encoded: Encoded,
    batch: Mapping[str, Tensor],
    masks: StepMasks,
    similarity: Tensor | None = None,
) -> Fused:
    """Run the fusion encoder on every view.

    Args:
        similarity: (B, B) text-to-image, that chooses hard negatives; None draws them uniformly.
    """
    mask = batch["text_mask"].bool()
    texts = [encoded.texts[view.text] for view in plan.views]
    images = [_view_image(view, encoded, masks, similarity) for view in plan.views]
    words = text_places(masks, mask.sum(1))
    whole = encoded.num_frames * (1 + model.config.num_patches)
    # Views of one size have the same places.
    by_size = {size: image_places(masks, encoded.num_frames, size) for size in {whole, *(x.shape[1] for x in images)}}
    spots = [by_size[image.shape[1]] for image in images]
    text_index = [words.joined(view.text_reads) for view in plan.views]
    image_index = [spot.joined(view.image_reads) for spot, view in zip(spots, plan.views, strict=True)]
    run = _fuse_packed if plan.step.pack else _fuse_apart
    text, image = run(model, plan, texts, images, batch, text_index, image_index)
    return Fused(
        {view.name: words.split(part, view.text_reads) for view, part in zip(plan.views, text, strict=True)},
        {
            view.name: spot.split(part, view.image_reads)
            for view, spot, part in zip(plan.views, spots, image, strict=True)
        },
        words,
        by_size[whole],
    )


def _view_image(view: View, encoded: Encoded, masks: StepMasks, similarity: Tensor | None) -> Tensor:
    image = encoded.images[view.image]
    if view.negatives == "merged":
        return image.index_copy(0, masks.false_rows, encoded.images["false"])
    if view.negatives == "rows":
        own = masks.itm_labels.bool()
        rows = torch.arange(len(own), device=own.device)
        return image[torch.where(own, rows, negative_images(masks, similarity))]
    return image


def _fuse_apart(model, plan, texts, images, batch, text_index, image_index):
    mask = batch["text_mask"].bool()
    text_layout, image_layout = Padded(mask), Padded()
    found = [], []
    for text, image, *index in zip(texts, images, text_index, image_index, strict=True):
        rows = [Rows(each, Padded()) for each in index]
        text, image = text + model.modality.weight[TEXT_TYPE], image + model.modality.weight[IMAGE_TYPE]
        if plan.step.prune_last_layer:
            whole = Section(0, len(image), image_layout)
            outputs = OutputSelection(*rows, whole, whole)
            text, image = model.fusion(text, text_layout, image, image_layout, outputs=outputs)
        else:
            text, image = model.fusion(text, text_layout, image, image_layout)
            text, image = rows[0].take(text), rows[1].take(image)
        found[0].append(text)
        found[1].append(image)
    return found


def _fuse_packed(model, plan, texts, images, batch, text_index, image_index):
    mask, views = batch["text_mask"].bool(), len(plan.views)
    rows, device = len(mask), mask.device
    order, text_layout = pack(mask.repeat(views, 1), views * text_tokens(batch))
    text = torch.cat(texts).flatten(0, 1).index_select(0, order) + model.modality.weight[TEXT_TYPE]
    lengths = [image.shape[1] for image in images]
    image_layout = uniform(tuple((rows, length) for length in lengths), 1, device)
    image = torch.cat([each.flatten(0, 1) for each in images]) + model.modality.weight[IMAGE_TYPE]

    def section(reads: str) -> Section:
        """The image tokens of the views of which this stream is read; the others have none."""
        wanted = [bool(getattr(view, reads)) for view in plan.views]
        first, last = wanted.index(True), views - wanted[::-1].index(True)
        parts = tuple((rows, length if first <= i < last else 0) for i, length in enumerate(lengths))
        start, stop = (rows * sum(lengths[:end]) for end in (first, last))
        return Section(start, stop, uniform(parts, 1, device))

    def tokens(index: list[Tensor], starts: Tensor, total: int) -> Rows:
        starts = starts[:-1].long().view(views, rows, 1).unbind(0)
        flat = torch.cat([(each + start).flatten() for each, start in zip(index, starts, strict=True)])
        parts = tuple((rows, each.shape[1]) for each in index)
        return Rows(flat.clamp_max(total - 1), uniform(parts, 1, device))

    own = section("image_reads")
    text_rows = tokens(text_index, text_layout.cu_seqlens, len(text))
    if plan.step.prune_last_layer:
        image_rows = tokens(image_index, own.layout.cu_seqlens, own.stop - own.start)
        outputs = OutputSelection(text_rows, image_rows, section("text_reads"), own)
        text, image = model.fusion(text, text_layout, image, image_layout, outputs=outputs)
    else:
        text, image = model.fusion(text, text_layout, image, image_layout)
        image_rows = tokens(image_index, image_layout.cu_seqlens, len(image))
        text, image = text_rows.take(text), image_rows.take(image)
    return (
        [part.view(rows, -1, part.shape[-1]) for part in text.split([each.numel() for each in text_index])],
        [part.view(rows, -1, part.shape[-1]) for part in image.split([each.numel() for each in image_index])],
    )
