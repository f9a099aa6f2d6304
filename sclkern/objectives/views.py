"""The vocabulary of objectives: what an image and a caption look like in a view, and which tokens a loss reads.

A view is one (image variant, text variant) pair that goes through the fusion encoder. Objectives that read the same
view share its pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

# complete: the row's image. dropped: without ``image_mask_ratio`` of its patches. token_masked: with
# ``patch_token_ratio`` of its patches replaced by the mask token. matching: the row's image in half of the rows, a
# negative image in the others.
ImageVariant = Literal["complete", "dropped", "token_masked", "matching"]
# complete: the caption. mlm: with tokens to predict. completion: with ``text_mask_ratio`` of its tokens masked.
TextVariant = Literal["complete", "mlm", "completion"]
# Tokens of a caption: its CLS, the tokens that "mlm" predicts, the tokens that "completion" masks.
TextTokens = Literal["cls", "mlm", "completion"]
# Tokens of an image: the CLS of each frame, the patches that "token_masked" replaces.
ImageTokens = Literal["cls", "replaced"]

IMAGE_VARIANTS: tuple[ImageVariant, ...] = get_args(ImageVariant)
TEXT_VARIANTS: tuple[TextVariant, ...] = get_args(TextVariant)
TEXT_TOKENS: tuple[TextTokens, ...] = get_args(TextTokens)
IMAGE_TOKENS: tuple[ImageTokens, ...] = get_args(ImageTokens)


def check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` unless a name belongs to the vocabulary.

    Args:
        name: the field, for the message.
        value: the name.
        known: the vocabulary.
    """
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")


@dataclass(frozen=True)
class View:
    """One pass of the fusion encoder over the batch.

    Attributes:
        name: unique among views; the plan and the profiler show it.
        image: the image variant.
        text: the text variant.
    """

    name: str
    image: ImageVariant
    text: TextVariant

    def __post_init__(self) -> None:
        check_known("image", self.image, IMAGE_VARIANTS)
        check_known("text", self.text, TEXT_VARIANTS)


TOKEN_MASKED = View("token_masked", "token_masked", "complete")
MASKED_IMAGE = View("masked_image", "dropped", "complete")
MATCHING = View("itm", "matching", "complete")
MASKED_TEXT = View("masked_text", "complete", "completion")
MLM = View("mlm", "complete", "mlm")
# In the order in which the fusion encoder packs them; views of other objectives follow.
VIEWS = (TOKEN_MASKED, MASKED_IMAGE, MATCHING, MASKED_TEXT, MLM)


@dataclass(frozen=True)
class ViewOutputs:
    """The fused tokens of one view that an objective reads.

    Attributes:
        view: the view.
        text: kinds of tokens of the text stream; () where none is read.
        image: kinds of tokens of the image stream; () where none is read.
    """

    view: View
    text: tuple[TextTokens, ...] = ()
    image: tuple[ImageTokens, ...] = ()

    def __post_init__(self) -> None:
        if not self.text and not self.image:
            raise ValueError(f"text, image: both are empty, expected tokens of view {self.view.name!r} to read")
        for tokens in self.text:
            check_known("text", tokens, TEXT_TOKENS)
        for patches in self.image:
            check_known("image", patches, IMAGE_TOKENS)
