"""MLSC, masked language semantic completion: recover the CLS of the whole caption from a masked one and the image."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed import ProcessGroup

from sclkern import ops
from sclkern.objectives._common import Directions, Gather, Negatives, op_directions, same_images
from sclkern.objectives.config import ObjectiveConfig
from sclkern.objectives.inputs import LossInputs
from sclkern.objectives.objective import LossOutput, Objective
from sclkern.objectives.views import MASKED_IMAGE, MASKED_TEXT, ViewOutputs


def masked_language_semantic_completion(
    recovered: Tensor,
    complete: Tensor,
    *,
    temperature: float = 0.03,
    directions: Directions = "both",
    same: Tensor | None = None,
    group: ProcessGroup | None = None,
    gather: Gather = "exact",
    negatives: Negatives = "all",
    backend: str = "auto",
) -> Tensor:
    """Contrast the text CLS recovered from a masked caption and the whole image with the text CLS of the whole caption
    (published objectives.py, compute_scl).

    Args:
        recovered: (B, D), fused CLS of the view with a masked caption.
        complete: (B, D), fused CLS of the view with dropped patches; detached here.
        temperature: of the InfoNCE.
        directions: as in ``ObjectiveConfig``.
        same: (B,) int64 ids of images; other pairs of one image are no negatives. None: they are.
        group: process group whose rows are negatives too.
        gather: gradient through the all-gather, see ``ops.completion_loss``.
        negatives: "published" contrasts within the rank.
        backend: of the op.

    Returns:
        0-d loss.
    """
    return ops.completion_loss(
        recovered,
        complete.detach(),
        temperature=temperature,
        directions=op_directions(directions),
        same=same,
        group=group,
        gather=gather if negatives == "all" else None,
        backend=backend,
    )


def _features(inputs: LossInputs) -> dict[str, Tensor]:
    features = {"recovered": inputs.text(MASKED_TEXT)[:, 0], "complete": inputs.text(MASKED_IMAGE)[:, 0].detach()}
    return features | same_images(inputs.batch, inputs.options)


def _contrast(features: Mapping[str, Tensor], options: ObjectiveConfig, backend: str) -> LossOutput:
    loss = masked_language_semantic_completion(
        features["recovered"],
        features["complete"],
        temperature=options.temperature,
        directions=options.directions,
        same=features.get("same"),
        gather=options.gather,
        negatives=options.negatives,
        backend=backend,
    )
    return LossOutput(loss)


def _loss(inputs: LossInputs) -> LossOutput:
    return _contrast(_features(inputs), inputs.options, inputs.network.backend)


MLSC = Objective(
    name="mlsc",
    title="MLSC, masked language completion",
    loss=_loss,
    outputs=(ViewOutputs(MASKED_IMAGE, text=("cls",)), ViewOutputs(MASKED_TEXT, text=("cls",))),
    features=_features,
    contrast=_contrast,
)
