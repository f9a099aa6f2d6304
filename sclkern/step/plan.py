"""The plan of a step: which variants are encoded, which views are fused, and what the losses read of each.

A view is an (image variant, text variant) pair that goes through the fusion encoder. Recipe "scl" has ITM (image or
false image, text), MLM (image, mlm text), masked image (dropped image, text) and masked text (image, completion-masked
text); "glscl" adds token-masked image (image with replaced patches, text). MVSC recovers the image CLS in masked image
and finds it in masked text; MLSC recovers the text CLS in masked text and finds it in masked image (SCL, section 3;
reference: scl_module.py, objectives.py compute_scl). The plan depends on the recipe alone, never on a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sclkern.objectives.config import ObjectiveConfig
from sclkern.step.config import StepConfig

# What an image encoder is given: the picture, the false pictures of the rows that do not match, both mixed by row, the
# kept patches, the picture with replaced patches.
ImageVariant = Literal["complete", "false", "mixed", "dropped", "token_masked"]
TextVariant = Literal["complete", "mlm", "completion"]
# Tokens of a view that a loss reads. Text: its CLS, words to predict, words to complete. Image: the CLS of each frame,
# the replaced patches.
TextRead = Literal["cls", "mlm", "completion"]
ImageRead = Literal["cls", "replaced"]


@dataclass(frozen=True)
class Encoding:
    """One run of an encoder over the batch. ``name`` is that of the variant, with the reader where it has its own."""

    name: str
    variant: str


@dataclass(frozen=True)
class View:
    """One pass of the fusion encoder over the batch.

    Attributes:
        image, text: names of encodings. negatives: how the false images of ITM enter: not at all, as other rows of
            ``image`` ("rows"), or as the rows of encoding "false" ("merged").
        text_reads, image_reads: the tokens whose output a loss reads.
    """

    name: str
    image: str
    text: str
    text_reads: tuple[TextRead, ...]
    image_reads: tuple[ImageRead, ...]
    negatives: Literal["none", "rows", "merged"] = "none"


@dataclass(frozen=True)
class Plan:
    """Encodings in the order they are packed, and views likewise."""

    images: tuple[Encoding, ...]
    texts: tuple[Encoding, ...]
    views: tuple[View, ...]
    step: StepConfig

    def encoding_of(self, reader: str, variant: str, modality: Literal["image", "text"]) -> str:
        """The encoding that a reader ("itc", or a view) takes a variant from."""
        return _name(reader, variant, modality, self.step)


def _name(reader: str, variant: str, modality: str, step: StepConfig) -> str:
    if step.share_encodings in ("all", f"{modality}s"):
        return variant
    # The contrast, which is no view, reads the texts of ITM, the other loss of whether a pair belongs together.
    reader = "itm" if reader == "itc" and step.share_encodings == "images" else reader
    return f"{variant}/{reader}"


def make_plan(objectives: ObjectiveConfig, step: StepConfig) -> Plan:
    """The plan of a recipe.

    Views that nothing reads of in one stream stand at an end, so that a slice leaves their tokens out.
    """
    local = "mltc" in objectives.tasks
    matching = "complete"
    negatives = "rows"
    if objectives.dataset_negatives:
        matching, negatives = ("complete", "merged") if step.share_encodings != "none" else ("mixed", "none")

    def view(name, image, text, text_reads, image_reads, negatives="none") -> View:
        sources = _name(name, image, "image", step), _name(name, text, "text", step)
        return View(name, *sources, text_reads, image_reads, negatives)

    words = ("cls", "completion") if local else ("cls",)
    views = [
        view("masked_image", "dropped", "complete", words, ("cls",)),
        view("itm", matching, "complete", ("cls",), ("cls",), negatives),
        view("masked_text", "complete", "completion", words, ("cls", "replaced") if local else ("cls",)),
        view("mlm", "complete", "mlm", ("mlm",), ()),
    ]
    if local:
        views.insert(0, view("token_masked", "token_masked", "complete", (), ("replaced",)))

    images, texts = {}, {}
    for modality, side in ((images, "image"), (texts, "text")):
        name = _name("itc", "complete", side, step)
        modality[name] = Encoding(name, "complete")
        for each in views:
            name = getattr(each, side)
            modality[name] = Encoding(name, name.partition("/")[0])
    if negatives == "merged":
        images["false"] = Encoding("false", "false")
    return Plan(tuple(images.values()), tuple(texts.values()), tuple(views), step)
