"""Run the fusion encoder on every view of a plan, and keep the tokens that the losses read.

B rows of the batch, L padded caption length, F frames, P patches, D width, K tokens read of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sclkern.models.fusion import OutputSelection, Section
from sclkern.models.layouts import DropoutKeys, Packed, Padded, Rows
from sclkern.models.network import IMAGE_TYPE, TEXT_TYPE, SCLNetwork
from sclkern.objectives.inputs import TokenPositions
from sclkern.step.dropout import BatchKeys, view_number
from sclkern.step.encoding import Encodings, pack, packed_layout, text_tokens
from sclkern.step.masks import StepMasks, drawn, negative_images, selected_positions
from sclkern.step.plan import Plan, PlannedView


@dataclass(frozen=True)
class ViewInputs:
    """What one view gives to the fusion encoder, and where the tokens stand that are read of it.

    Attributes:
        view: of the plan.
        text: (B, L, D) unimodal tokens; padding rows are undefined.
        image: (B, F * (1 + P), D) unimodal tokens.
        text_index: (B, K) int64 positions of the text tokens that are read; K may be 0.
        image_index: (B, K) int64 positions of the image tokens that are read; K may be 0.
    """

    view: PlannedView
    text: Tensor
    image: Tensor
    text_index: Tensor
    image_index: Tensor


@dataclass(frozen=True)
class ViewOutput:
    """The fused tokens that are read of one view.

    Attributes:
        text: (B, K, D), at ``ViewInputs.text_index``.
        image: (B, K, D), at ``ViewInputs.image_index``.
    """

    text: Tensor
    image: Tensor


@dataclass(frozen=True)
class FusedTokens:
    """The fused tokens that the losses read.

    Attributes:
        text: (B, K, D) by view and kind of token.
        image: likewise, of the image stream.
    """

    text: dict[str, dict[str, Tensor]]
    image: dict[str, dict[str, Tensor]]


def text_token_positions(masks: StepMasks, lengths: Tensor) -> TokenPositions:
    """Find the CLS, the tokens to predict and the tokens to complete of each caption.

    Args:
        masks: "mlm" and "completion" are left out where they are not drawn.
        lengths: (B,) tokens of each caption.

    Returns:
        The positions.
    """
    index, valid = {"cls": lengths.new_zeros((len(lengths), 1))}, {}
    for name, text, capacity in (
        ("mlm", masks.mlm, masks.mlm_capacity),
        ("completion", masks.completion, masks.completion_capacity),
    ):
        if text is not None:
            positions, valid[name] = selected_positions(text.selected, capacity)
            # What fills the room must be a token of the row: packed, the next position is another caption's.
            index[name] = torch.minimum(positions, (lengths[:, None] - 1).clamp_min(0))
    return TokenPositions(index, valid)


def image_token_positions(
    masks: StepMasks, num_frames: int, tokens: int, *, rows: int, device: torch.device
) -> TokenPositions:
    """Find the CLS of each frame, and the replaced patches, once a frame (the published code replaces in images only).

    Args:
        masks: "replaced" is left out where no mask of patches is drawn.
        num_frames: F.
        tokens: of an image or clip, CLS included.
        rows: B.
        device: of the batch.

    Returns:
        The positions, frame by frame.
    """
    frame = torch.arange(num_frames, device=device) * (tokens // num_frames)
    index, valid = {"cls": frame.expand(rows, -1)}, {}
    if masks.replace is not None:
        positions, present = selected_positions(masks.replace, masks.replace_capacity)
        index["replaced"] = (frame[:, None] + 1 + positions[:, None]).flatten(1)
        valid["replaced"] = present[:, None].expand(-1, num_frames, -1).flatten(1)
    return TokenPositions(index, valid)


def fuse_views(
    network: SCLNetwork,
    plan: Plan,
    encodings: Encodings,
    batch: Mapping[str, Any],
    masks: StepMasks,
    text_positions: TokenPositions,
    similarity: Tensor | None = None,
    keys: BatchKeys | None = None,
) -> FusedTokens:
    """Run the fusion encoder on every view of the plan.

    Args:
        network: the fusion encoder and the modality table.
        plan: with at least one view.
        encodings: of the plan.
        batch: ``text_ids``, ``text_mask`` and, where known, ``text_tokens``.
        masks: those that the plan needs.
        text_positions: of the tokens in a caption.
        similarity: (B, B) text to image, which chooses hard negatives; None draws negatives uniformly.
        keys: of dropout; None draws by where the tokens lie.

    Returns:
        The tokens that the losses read.
    """
    images = [_view_image(view, encodings, masks, similarity) for view in plan.views]
    # Views of one size have the same positions.
    sizes = {image.shape[1] for image in images}
    rows, device = len(batch["text_ids"]), batch["text_ids"].device
    by_size = {
        size: image_token_positions(masks, encodings.num_frames, size, rows=rows, device=device) for size in sizes
    }
    inputs = [
        ViewInputs(
            view,
            encodings.texts[view.text.name],
            image,
            text_positions.concatenate(view.text_outputs),
            by_size[image.shape[1]].concatenate(view.image_outputs),
        )
        for view, image in zip(plan.views, images, strict=True)
    ]
    fuse = _fuse_packed if plan.step.pack else _fuse_padded
    outputs = fuse(network, inputs, batch, keys, prune=plan.step.prune_last_layer)
    text, image_tokens = {}, {}
    for entry, output in zip(inputs, outputs, strict=True):
        name, positions = entry.view.name, by_size[entry.image.shape[1]]
        text[name] = text_positions.split(output.text, entry.view.text_outputs)
        image_tokens[name] = positions.split(output.image, entry.view.image_outputs)
    return FusedTokens(text, image_tokens)


def _view_image(view: PlannedView, encodings: Encodings, masks: StepMasks, similarity: Tensor | None) -> Tensor:
    image = encodings.images[view.image.name]
    if view.negatives == "merged":
        return image.index_copy(0, masks.negative_rows, encodings.images["negative"])
    if view.negatives == "rows":
        if masks.false_rows is not None:
            return image[masks.false_rows]
        matches = drawn(masks.itm_labels, "itm_labels").bool()
        rows = torch.arange(len(matches), device=matches.device)
        return image[torch.where(matches, rows, negative_images(masks, similarity))]
    return image


def _fuse_padded(
    network: SCLNetwork, inputs: list[ViewInputs], batch: Mapping[str, Any], keys: BatchKeys | None, *, prune: bool
) -> list[ViewOutput]:
    """One padded call of the fusion encoder for each view."""
    mask, outputs = batch["text_mask"], []
    for entry in inputs:
        text_keys = image_keys = None
        if keys is not None:
            numbers = [view_number(entry.view.name)]
            text_keys, image_keys = (keys.padded(numbers, x.shape[1]) for x in (entry.text, entry.image))
        text_layout, image_layout = Padded(mask, keys=text_keys), Padded(keys=image_keys)
        text_rows, image_rows = (
            Rows(index, Padded(keys=None if of is None else of._replace(tokens=of.tokens.gather(1, index))))
            for index, of in ((entry.text_index, text_keys), (entry.image_index, image_keys))
        )
        text = entry.text + network.modality.weight[TEXT_TYPE]
        image = entry.image + network.modality.weight[IMAGE_TYPE]
        if prune:
            whole = Section(0, len(image), image_layout)
            selection = OutputSelection(text_rows, image_rows, whole, whole)
            text, image = network.fusion(text, text_layout, image, image_layout, outputs=selection)
        else:
            text, image = network.fusion(text, text_layout, image, image_layout)
            text, image = text_rows.take(text), image_rows.take(image)
        outputs.append(ViewOutput(text, image))
    return outputs


def _fuse_packed(
    network: SCLNetwork, inputs: list[ViewInputs], batch: Mapping[str, Any], keys: BatchKeys | None, *, prune: bool
) -> list[ViewOutput]:
    """One call of the fusion encoder for all views, one after the other, without padding."""
    mask = batch["text_mask"]
    rows = len(mask)
    lengths = [entry.image.shape[1] for entry in inputs]
    text_keys = image_keys = None
    if keys is not None:
        numbers = [view_number(entry.view.name) for entry in inputs]
        text_keys, image_keys = keys.padded(numbers, mask.shape[1]), keys.packed(numbers, lengths)
    order, text_layout = pack(mask.repeat(len(inputs), 1), len(inputs) * text_tokens(batch), text_keys)
    text = torch.cat([entry.text for entry in inputs]).flatten(0, 1).index_select(0, order)
    text = text + network.modality.weight[TEXT_TYPE]
    groups = tuple((rows, length) for length in lengths)
    image_layout = packed_layout(groups, 1, mask.device)._replace(keys=image_keys)
    image = torch.cat([entry.image.flatten(0, 1) for entry in inputs]) + network.modality.weight[IMAGE_TYPE]

    text_index, image_index = [entry.text_index for entry in inputs], [entry.image_index for entry in inputs]
    text_rows = _packed_rows(text_index, text_layout.cu_seqlens, len(text), text_layout.keys)
    if prune:
        text_context, _ = _image_section(inputs, rows, lambda view: bool(view.text_outputs))
        image_section, layout = _image_section(inputs, rows, lambda view: bool(view.image_outputs))
        if image_keys is not None:
            image_keys = image_keys._replace(tokens=image_keys.tokens[image_section.start : image_section.stop])
        number_of_tokens = image_section.stop - image_section.start
        image_rows = _packed_rows(image_index, layout.cu_seqlens, number_of_tokens, image_keys)
        selection = OutputSelection(text_rows, image_rows, text_context, image_section)
        text, image = network.fusion(text, text_layout, image, image_layout, outputs=selection)
    else:
        text, image = network.fusion(text, text_layout, image, image_layout)
        image_rows = _packed_rows(image_index, image_layout.cu_seqlens, len(image))
        text, image = text_rows.take(text), image_rows.take(image)
    texts = text.split([index.numel() for index in text_index])
    images = image.split([index.numel() for index in image_index])
    return [
        ViewOutput(
            text.view(*entry.text_index.shape, text.shape[-1]), image.view(*entry.image_index.shape, image.shape[-1])
        )
        for text, image, entry in zip(texts, images, inputs, strict=True)
    ]


def _image_section(
    inputs: list[ViewInputs], rows: int, is_read: Callable[[PlannedView], bool]
) -> tuple[Section, Packed]:
    """The packed image tokens of the views of which a stream is read, which are neighbours, and their layout, in which
    the other views have no token."""
    read = [number for number, entry in enumerate(inputs) if is_read(entry.view)]
    first, last = (read[0], read[-1] + 1) if read else (0, 0)
    lengths = [entry.image.shape[1] for entry in inputs]
    groups = tuple((rows, length if first <= i < last else 0) for i, length in enumerate(lengths))
    start, stop = (rows * sum(lengths[:end]) for end in (first, last))
    layout = packed_layout(groups, 1, inputs[0].image.device)
    return Section(start, stop, layout), layout


def _packed_rows(index: list[Tensor], cu_seqlens: Tensor, total: int, keys: DropoutKeys | None = None) -> Rows:
    """The tokens that are read, as rows of the packed batch.

    Args:
        index: (B, K) positions in a sequence, for each view.
        cu_seqlens: (views * B + 1,) where the sequences start.
        total: number of packed tokens.
        keys: of dropout in the packed batch.

    Returns:
        The rows, view by view.
    """
    rows = index[0].shape[0]
    starts = cu_seqlens[:-1].long().view(len(index), rows, 1).unbind(0)
    flat = torch.cat([(positions + start).flatten() for positions, start in zip(index, starts, strict=True)])
    groups = tuple((rows, positions.shape[1]) for positions in index)
    flat, layout = flat.clamp_max(total - 1), packed_layout(groups, 1, cu_seqlens.device)
    if keys is not None:
        keys = keys._replace(tokens=keys.tokens.index_select(0, flat))
    return Rows(flat, layout._replace(keys=keys))
