"""The plan of a step: which variants are encoded, which views the fusion encoder reads, which tokens the losses read.

The plan is the union of what the objectives of the recipe read; nothing else is computed. It depends on the options
alone, never on a batch. (Views: SCL, arXiv 2211.13437, section 3; published scl_module.py and objectives.py.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sclkern.objectives.config import ObjectiveConfig
from sclkern.objectives.views import (
    IMAGE_TOKENS,
    MATCHING,
    TEXT_TOKENS,
    VIEWS,
    ImageTokens,
    ImageVariant,
    TextTokens,
    TextVariant,
    View,
)
from sclkern.step.config import StepConfig

# What the image encoder reads: the image, the negative images of the rows that need one, both mixed by row, the kept
# patches, the image with replaced patches.
EncodedImage = Literal["complete", "negative", "mixed", "dropped", "token_masked"]
# How the negative images of variant "matching" enter a view: not at all, as other rows of the view's image encoding, or
# merged in from encoding "negative".
NegativeSource = Literal["none", "rows", "merged"]
# The consumer of encodings that objectives read before fusion.
UNIMODAL = "unimodal"


@dataclass(frozen=True)
class ImageEncoding:
    """One run of the image encoder over the batch.

    Attributes:
        name: the variant, with the consumer where that has an encoding of its own.
        variant: what is encoded.
    """

    name: str
    variant: EncodedImage


@dataclass(frozen=True)
class TextEncoding:
    """One run of the text encoder over the batch.

    Attributes:
        name: the variant, with the consumer where that has an encoding of its own.
        variant: what is encoded.
    """

    name: str
    variant: TextVariant


@dataclass(frozen=True)
class PlannedView:
    """One pass of the fusion encoder over the batch.

    Attributes:
        name: of the ``View``.
        image: the encoding that it reads.
        text: the encoding that it reads.
        text_outputs: the tokens of the text stream that a loss reads.
        image_outputs: the tokens of the image stream that a loss reads.
        negatives: where its negative images come from.
    """

    name: str
    image: ImageEncoding
    text: TextEncoding
    text_outputs: tuple[TextTokens, ...]
    image_outputs: tuple[ImageTokens, ...]
    negatives: NegativeSource = "none"


@dataclass(frozen=True)
class Plan:
    """Everything that a step computes before its losses.

    Attributes:
        images: runs of the image encoder, in the order in which they are packed.
        texts: runs of the text encoder, likewise.
        views: passes of the fusion encoder, likewise.
        unimodal_images: the encodings that objectives read before fusion.
        unimodal_texts: likewise.
        step: the options of the execution.
    """

    images: tuple[ImageEncoding, ...]
    texts: tuple[TextEncoding, ...]
    views: tuple[PlannedView, ...]
    unimodal_images: tuple[ImageEncoding, ...]
    unimodal_texts: tuple[TextEncoding, ...]
    step: StepConfig


def make_plan(
    objectives: ObjectiveConfig,
    step: StepConfig,
    *,
    false_images: bool | None = None,
    whole: ObjectiveConfig | None = None,
) -> Plan:
    """Plan what the objectives of a recipe read.

    Args:
        objectives: the recipe, and the source of negative images.
        step: which encodings are shared.
        false_images: whether the batch brings the negative images; None: as ``objectives.dataset_negatives`` says.
        whole: the recipe of which ``objectives`` has a part, so that encodings belong to the same consumers, and draw
            the same dropout, as in its plan; None: ``objectives`` is the whole.

    Returns:
        The plan. Views of which one stream is not read stand at an end, so that a slice leaves their tokens out.
    """
    outputs = _merged_outputs(objectives)
    unimodal_images, unimodal_texts = _unimodal_variants(objectives)
    # ITC reads the texts of ITM, the other loss of whether a pair belongs together.
    matching = MATCHING in _merged_outputs(whole or objectives)
    text_owner = MATCHING.name if step.share_encodings == "images" and matching else UNIMODAL
    false_images = objectives.dataset_negatives if false_images is None else false_images
    images: dict[str, ImageEncoding] = {}
    texts: dict[str, TextEncoding] = {}

    def encode_image(consumer: str, variant: EncodedImage) -> ImageEncoding:
        name = variant if step.share_encodings in ("all", "images") else f"{variant}/{consumer}"
        return images.setdefault(name, ImageEncoding(name, variant))

    def encode_text(consumer: str, variant: TextVariant) -> TextEncoding:
        name = variant if step.share_encodings == "all" else f"{variant}/{consumer}"
        return texts.setdefault(name, TextEncoding(name, variant))

    def image_source(image: ImageVariant) -> tuple[EncodedImage, NegativeSource]:
        if image != "matching":
            return image, "none"
        if not false_images:
            return "complete", "rows"
        return ("mixed", "none") if step.share_encodings == "none" else ("complete", "merged")

    read_images = tuple(encode_image(UNIMODAL, variant) for variant in unimodal_images)
    # The matching view encodes complete captions only.
    read_texts = tuple(
        encode_text(text_owner if variant == MATCHING.text else UNIMODAL, variant) for variant in unimodal_texts
    )
    views = []
    for view, (text_outputs, image_outputs) in outputs.items():
        variant, negatives = image_source(view.image)
        views.append(
            PlannedView(
                view.name,
                encode_image(view.name, variant),
                encode_text(view.name, view.text),
                text_outputs,
                image_outputs,
                negatives,
            )
        )
    if any(view.negatives == "merged" for view in views):
        images["negative"] = ImageEncoding("negative", "negative")
    return Plan(tuple(images.values()), tuple(texts.values()), tuple(views), read_images, read_texts, step)


def _merged_outputs(objectives: ObjectiveConfig) -> dict[View, tuple[tuple[TextTokens, ...], tuple[ImageTokens, ...]]]:
    """The views of a recipe in the order in which they are packed, with what is read of either stream."""
    text: dict[View, set[TextTokens]] = {}
    image: dict[View, set[ImageTokens]] = {}
    for objective in objectives.selected:
        for outputs in objective.outputs:
            text.setdefault(outputs.view, set()).update(outputs.text)
            image.setdefault(outputs.view, set()).update(outputs.image)
    ordered = [view for view in VIEWS if view in text] + [view for view in text if view not in VIEWS]
    # First the views whose text is not read, last those whose image is not read.
    ordered.sort(key=lambda view: (bool(text[view]), not image[view]))
    return {
        view: (
            tuple(tokens for tokens in TEXT_TOKENS if tokens in text[view]),
            tuple(tokens for tokens in IMAGE_TOKENS if tokens in image[view]),
        )
        for view in ordered
    }


def _unimodal_variants(
    objectives: ObjectiveConfig,
) -> tuple[tuple[Literal["complete", "dropped", "token_masked"], ...], tuple[TextVariant, ...]]:
    """The variants whose encoding a recipe reads before fusion."""
    images: dict[Literal["complete", "dropped", "token_masked"], None] = {}
    texts: dict[TextVariant, None] = {}
    for objective in objectives.selected:
        # ``Objective`` refuses "matching" here: which images do not match is decided row by row, for a view.
        images |= {variant: None for variant in objective.unimodal_images if variant != "matching"}
        texts |= dict.fromkeys(objective.unimodal_texts)
    if objectives.hard_negatives:
        images["complete"] = texts["complete"] = None
    return tuple(images), tuple(texts)
