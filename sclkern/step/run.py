"""The losses of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sclkern.errors import UserError
from sclkern.objectives import losses as L
from sclkern.ops.dispatch import may_read
from sclkern.profiling import phase
from sclkern.step.execute import Fused, encode, fuse
from sclkern.step.masks import StepMasks
from sclkern.step.plan import make_plan

if TYPE_CHECKING:
    from sclkern.model import SCLModel
    from sclkern.models.config import SCLConfig
    from sclkern.objectives.config import ObjectiveConfig


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


def run_step(model: SCLModel, batch: Mapping[str, Tensor], masks: StepMasks) -> SCLLosses:
    """Losses of one step from given masks, executed as ``model.step`` says (``sclkern.step.plan``).

    Raises:
        ValueError: a head or input that an objective needs is missing, or a batch too small for in-batch negatives.
    """
    objectives = model.objectives
    check_step(model, batch)
    plan = make_plan(objectives, model.step)
    encoded = encode(model, plan, batch, masks)
    text = encoded.texts[plan.encoding_of("itc", "complete", "text")]
    image = encoded.images[plan.encoding_of("itc", "complete", "image")]
    frame_cls = image[:, :: image.shape[1] // encoded.num_frames]
    contrast = model.project(text[:, 0], frame_cls)
    similarity = None
    if objectives.itm_negatives == "hard":
        unit = [torch.nn.functional.normalize(x.detach().float(), dim=-1) for x in contrast]
        similarity = unit[0] @ unit[1].T / model.contrast_temperature()
    with phase("fusion"):
        fused = fuse(model, plan, encoded, batch, masks, similarity)

    out = SCLLosses(total=torch.zeros((), device=text.device))
    with phase("loss itc"):
        out.itc = L.image_text_contrast(
            contrast[1], contrast[0], model.contrast_temperature(), gather=objectives.gather, backend=model.backend
        )
    with phase("loss itm"):
        _matching(model, fused, masks, out)
    with phase("loss mlm"):
        _words(model, fused, batch, out)
    _completion(model, fused, encoded.num_frames, out)
    out.total = out.itm + out.mlm + objectives.itc_weight * out.itc + out.mvsc + out.mlsc
    if out.mltc is not None:
        out.total = out.total + objectives.mltc_weight * out.mltc
    out.metrics["itc_temperature"] = model.contrast_temperature().detach()
    return out


def _matching(model: SCLModel, fused: Fused, masks: StepMasks, out: SCLLosses) -> None:
    logits = model.itm_head(model.pool(fused.text["itm"]["cls"][:, 0], fused.image["itm"]["cls"]))
    out.itm = L.image_text_matching(logits, masks.itm_labels)
    out.metrics["itm_accuracy"] = (logits.detach().argmax(-1) == masks.itm_labels).float().mean()


def _words(model: SCLModel, fused: Fused, batch: Mapping[str, Tensor], out: SCLLosses) -> None:
    valid = fused.text_places.valid["mlm"]
    labels = torch.where(valid, batch["text_ids"].gather(1, fused.text_places.index["mlm"]), -100)
    head = model.mlm_head
    out.mlm, hits = L.masked_language_modeling(
        head.transform(fused.text["mlm"]["mlm"]),
        head.decoder.weight,
        head.decoder.bias,
        labels,
        empty=model.objectives.empty_selections,
        backend=model.backend,
    )
    out.metrics["mlm_accuracy"] = hits / valid.sum().clamp_min(1)


def _completion(model: SCLModel, fused: Fused, num_frames: int, out: SCLLosses) -> None:
    objectives, text, image = model.objectives, fused.text, fused.image
    options = {
        "temperature": objectives.temperature,
        "directions": objectives.directions,
        "gather": objectives.gather,
        "backend": model.backend,
    }
    with phase("loss mvsc"):
        out.mvsc = L.masked_vision_semantic_completion(
            image["masked_image"]["cls"],
            image["masked_text"]["cls"],
            # The published code normalises over frames for clips alone; an image's features would all become signs.
            frame_norm=objectives.frame_norm if num_frames > 1 else "features",
            **options,
        )
    options["negatives"] = objectives.negatives
    with phase("loss mlsc"):
        out.mlsc = L.masked_language_semantic_completion(
            text["masked_text"]["cls"][:, 0], text["masked_image"]["cls"][:, 0], **options
        )
    if "mltc" in objectives.tasks:
        with phase("loss mltc"):
            _local_completion(model, fused, options, out)


def _local_completion(model: SCLModel, fused: Fused, options: dict[str, Any], out: SCLLosses) -> None:
    text, image = fused.text, fused.image
    empty = model.objectives.empty_selections
    words, patches = fused.text_places.valid["completion"], fused.image_places.valid["replaced"]
    parts = {
        "mltc_image": L.masked_local_token_completion(
            image["token_masked"]["replaced"], image["masked_text"]["replaced"], patches, empty=empty, **options
        ),
        "mltc_text": L.masked_local_token_completion(
            text["masked_text"]["completion"],
            text["masked_image"]["completion"],
            words,
            empty=empty,
            **{**options, "negatives": "all"},
        ),
    }
    if empty == "reference":
        parts = {name: torch.zeros_like(part) if torch.isnan(part) else part for name, part in parts.items()}
    out.mltc = sum(parts.values())
    out.metrics.update({name: part.detach() for name, part in parts.items()})


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
    # Read where that costs nothing: captions that do not fit would lose words in silence.
    if (
        "text_tokens" in batch
        and may_read(batch["text_mask"])
        and (found := int(batch["text_mask"].sum())) > batch["text_tokens"]
    ):
        raise ValueError(f"batch: got text_tokens {batch['text_tokens']}, expected room for the {found} of text_mask")
