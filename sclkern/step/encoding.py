"""Run the unimodal encoders on every variant of a plan.

B rows of the batch, L padded caption length, F frames, P patches, D width. Shapes follow from the plan and the shapes
of the batch, so nothing is read back; packed texts have room for a given number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.models.layouts import DropoutKeys, Packed, Padded
from sclkern.models.network import SCLNetwork
from sclkern.profiling import phase
from sclkern.step.dropout import BatchKeys, text_number
from sclkern.step.masks import StepMasks, drawn
from sclkern.step.plan import EncodedImage, Plan


@dataclass(frozen=True)
class Encodings:
    """Unimodal features after the modality transforms.

    Attributes:
        texts: (B, L, D) by name of the encoding; padding rows are undefined.
        images: (rows, F * (1 + P), D) by name, frame by frame with each CLS first; P may differ.
        num_frames: F.
    """

    texts: dict[str, Tensor]
    images: dict[str, Tensor]
    num_frames: int


def pack(mask: Tensor, total: int, keys: DropoutKeys | None = None) -> tuple[Tensor, Packed]:
    """Find the tokens of a padded batch, sequence after sequence.

    Args:
        mask: (S, L) bool, True = a token.
        total: room for tokens, at least as many as there are.
        keys: of dropout in the padded batch.

    Returns:
        (total,) int64 indices into the flattened batch, each once, the last ones padding where there is room left; and
        the layout of the tokens at these indices.
    """
    lengths = mask.sum(1, dtype=torch.int32)
    # Too small a total is not seen on a GPU, and no kernel must read behind the tokens.
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32).clamp_max(total), (1, 0))
    order = (~mask.flatten()).to(torch.uint8).argsort(stable=True)[:total]
    if keys is not None:
        keys = keys._replace(tokens=keys.tokens.flatten()[order])
    return order, Packed(cu_seqlens, mask.shape[1], mask=mask, padded_index=order, keys=keys)


def packed_layout(groups: tuple[tuple[int, int], ...], num_frames: int, device: torch.device) -> Packed:
    """The layout of groups of sequences of equal length, one group after the other.

    Args:
        groups: (sequences, length) of each group.
        num_frames: frames of each sequence.
        device: of the tokens.

    Returns:
        The layout.
    """
    starts, start = [], 0
    for sequences, length in groups:
        options: dict[str, Any] = {"dtype": torch.int32, "device": device}
        stop = start + sequences * length
        # Of empty sequences no range has the step.
        starts.append(
            torch.arange(start, stop, length, **options) if length else torch.full((sequences,), start, **options)
        )
        start = stop
    starts.append(torch.full((1,), start, dtype=torch.int32, device=device))
    return Packed(torch.cat(starts), max(length for _, length in groups), groups, num_frames)


def text_tokens(batch: Mapping[str, Any]) -> int:
    """Room for the tokens of the batch's captions.

    Args:
        batch: ``text_ids`` (B, L), and ``text_tokens`` where the loader counted the tokens.

    Returns:
        At most B * L.
    """
    padded = int(batch["text_ids"].numel())
    return min(int(batch.get("text_tokens", padded)), padded)


def encode(
    network: SCLNetwork, plan: Plan, batch: Mapping[str, Any], masks: StepMasks, keys: BatchKeys | None = None
) -> Encodings:
    """Run both unimodal encoders on every variant of the plan, and the modality transforms.

    Args:
        network: the encoders.
        plan: what is encoded.
        batch: as ``SCLModel.forward`` takes it.
        masks: those that the plan needs.
        keys: of dropout; None draws by where the tokens lie.

    Returns:
        The encodings.
    """
    image = batch["image"]
    num_frames = image.shape[1] if image.ndim == 5 else 1
    with phase("image encoder"):
        images = _encode_images(network, plan, batch, masks) if plan.images else {}
    with phase("text encoder"):
        texts = _encode_texts(network, plan, batch, masks, keys) if plan.texts else {}
    return Encodings(texts, images, num_frames)


def _encode_texts(
    network: SCLNetwork, plan: Plan, batch: Mapping[str, Any], masks: StepMasks, keys: BatchKeys | None
) -> dict[str, Tensor]:
    ids, mask = batch["text_ids"], batch["text_mask"]

    def variant_ids(variant: str) -> Tensor:
        if variant == "complete":
            return ids
        return drawn(masks.mlm, "mlm").ids if variant == "mlm" else drawn(masks.completion, "completion").ids

    variants = [variant_ids(text.variant) for text in plan.texts]
    numbers = [text_number(text.name) for text in plan.texts]
    if not plan.step.pack:
        encoder, encoded = network.text, {}
        for text, variant, number in zip(plan.texts, variants, numbers, strict=True):
            layout = Padded(mask, keys=None if keys is None else keys.padded([number], mask.shape[1]))
            tokens = encoder.encode(variant, encoder.positions(variant, mask), layout)
            encoded[text.name] = network.text_transform(tokens)
        return encoded
    stacked = torch.cat(variants)
    masks_of_all = mask.repeat(len(variants), 1)
    keys_of_all = None if keys is None else keys.padded(numbers, mask.shape[1])
    order, packed = pack(masks_of_all, len(variants) * text_tokens(batch), keys_of_all)
    positions = network.text.positions(stacked, masks_of_all)
    tokens = network.text.encode(stacked.flatten()[order], positions.flatten()[order], packed)
    tokens = network.text_transform(tokens)
    padded = tokens.new_zeros(stacked.numel(), tokens.shape[-1]).index_copy(0, order, tokens)
    encodings = padded.view(len(variants), *ids.shape, tokens.shape[-1]).unbind(0)
    return {text.name: encoding for text, encoding in zip(plan.texts, encodings, strict=True)}


def _encode_images(network: SCLNetwork, plan: Plan, batch: Mapping[str, Any], masks: StepMasks) -> dict[str, Tensor]:
    vision, transform = network.vision, network.image_transform
    embedded = [_embed_image(network, image.variant, batch, masks) for image in plan.images]
    num_frames = embedded[0][1]
    tokens = [x for x, _ in embedded]
    if plan.step.pack:
        groups = tuple((x.shape[0], x.shape[1]) for x in tokens)
        layout = packed_layout(groups, num_frames, tokens[0].device)
        packed = torch.cat([x.flatten(0, 1) for x in tokens])
        packed = transform(vision.encode(packed, layout))
        parts = packed.split([sequences * length for sequences, length in groups])
        tokens = [part.view(x.shape) for part, x in zip(parts, tokens, strict=True)]
    else:
        tokens = [transform(vision.encode(x, Padded(num_frames=num_frames))) for x in tokens]
    return {image.name: x for image, x in zip(plan.images, tokens, strict=True)}


def _embed_image(
    network: SCLNetwork, variant: EncodedImage, batch: Mapping[str, Any], masks: StepMasks
) -> tuple[Tensor, int]:
    """The tokens that the image encoder reads, and the number of frames."""
    image = batch["image"]
    if masks.place is not None and variant in ("negative", "mixed"):
        # One for each row whose label is 0.
        false = batch["false_image"]
        image = false if variant == "negative" else image.index_copy(0, masks.negative_rows, false)
    elif variant == "negative":
        image = batch["false_image"].index_select(0, masks.negative_rows)
    elif variant == "mixed":
        matches = drawn(masks.itm_labels, "itm_labels").bool().view(-1, *[1] * (image.ndim - 1))
        image = torch.where(matches, image, batch["false_image"])
    keep = drawn(masks.keep, "keep") if variant == "dropped" else None
    replace = drawn(masks.replace, "replace") if variant == "token_masked" else None
    return network.vision.embed(image, keep=keep, replace=replace)
