"""MVSC, masked vision semantic completion: recover the CLS of the whole image from a masked one and the caption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sclkern import ops
from sclkern.distributed import gather as gather_rows
from sclkern.objectives._common import (
    Directions,
    Gather,
    at_least_float32,
    mean_cross_entropy,
    op_directions,
    same_images,
)
from sclkern.objectives.config import ObjectiveConfig
from sclkern.objectives.inputs import LossInputs
from sclkern.objectives.objective import LossOutput, Objective
from sclkern.objectives.views import MASKED_IMAGE, MASKED_TEXT, ViewOutputs


def masked_vision_semantic_completion(
    recovered: Tensor,
    complete: Tensor,
    *,
    temperature: float = 0.03,
    directions: Directions = "both",
    frame_norm: Literal["features", "published"] = "features",
    same: Tensor | None = None,
    group: ProcessGroup | None = None,
    gather: Gather = "exact",
    backend: str = "auto",
) -> Tensor:
    """Contrast the image CLS recovered from a masked image and the whole caption with the image CLS of the whole image,
    separately for each frame index, averaged over frames (published objectives.py, compute_scl and compute_scl_video).

    Args:
        recovered: (B, F, D), fused CLS of the view with dropped patches.
        complete: (B, F, D), fused CLS of the view with a masked caption; detached here.
        temperature: of the InfoNCE.
        directions: as in ``ObjectiveConfig``.
        frame_norm: "published" normalises over frames instead of features, as compute_scl_video does.
        same: (B,) int64 ids of images; other pairs of one image are no negatives. None: they are.
        group: process group whose rows are negatives too.
        gather: gradient through the all-gather, see ``ops.completion_loss``.
        backend: of the op.

    Returns:
        0-d loss.
    """
    complete = complete.detach()
    if frame_norm == "features":
        return ops.completion_loss(
            recovered.transpose(0, 1),
            complete.transpose(0, 1),
            temperature=temperature,
            directions=op_directions(directions),
            same=same,
            group=group,
            gather=gather,
            backend=backend,
        )
    recovered, complete = gather_rows(recovered, group, gather), gather_rows(complete, group, gather)
    recovered, complete = at_least_float32(recovered).transpose(0, 1), at_least_float32(complete).transpose(0, 1)
    recovered = recovered / recovered.norm(dim=0, keepdim=True).clamp_min(1e-8)
    complete = complete / complete.norm(dim=0, keepdim=True).clamp_min(1e-8)
    similarity = recovered @ complete.mT / temperature
    own = torch.arange(similarity.shape[1], device=similarity.device)
    if same is not None:
        ids = gather_rows(same, group, gather)
        others = (ids[:, None] == ids) & (own[:, None] != own)
        similarity = similarity.masked_fill(others, -torch.inf)
    diagonal = own.expand(similarity.shape[:2])
    loss = mean_cross_entropy(similarity.mT, diagonal)
    if op_directions(directions) == "recovered_to_complete":
        return loss
    return loss + mean_cross_entropy(similarity, diagonal)


def _features(inputs: LossInputs) -> dict[str, Tensor]:
    features = {"recovered": inputs.image(MASKED_IMAGE), "complete": inputs.image(MASKED_TEXT).detach()}
    return features | same_images(inputs.batch, inputs.options)


def _contrast(features: Mapping[str, Tensor], options: ObjectiveConfig, backend: str) -> LossOutput:
    recovered, complete = features["recovered"], features["complete"]
    loss = masked_vision_semantic_completion(
        recovered,
        complete,
        temperature=options.temperature,
        directions=options.directions,
        # The published code normalises over frames for clips alone: of one frame, every feature would become a sign.
        frame_norm=options.frame_norm if recovered.shape[1] > 1 else "features",
        same=features.get("same"),
        gather=options.gather,
        backend=backend,
    )
    return LossOutput(loss)


def _loss(inputs: LossInputs) -> LossOutput:
    return _contrast(_features(inputs), inputs.options, inputs.network.backend)


MVSC = Objective(
    name="mvsc",
    title="MVSC, masked vision completion",
    loss=_loss,
    outputs=(ViewOutputs(MASKED_IMAGE, image=("cls",)), ViewOutputs(MASKED_TEXT, image=("cls",))),
    features=_features,
    contrast=_contrast,
)
