"""MLTC, masked local token completion (GLSCL, arXiv 2306.07096): recover each masked token from the other modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from sclkern import ops
from sclkern.distributed import gather as gather_rows
from sclkern.distributed import world_size
from sclkern.objectives._common import Directions, Empty, Gather, Negatives, completed_tokens, op_directions
from sclkern.objectives.config import ObjectiveConfig
from sclkern.objectives.inputs import LossInputs
from sclkern.objectives.objective import LossOutput, Objective
from sclkern.objectives.views import MASKED_IMAGE, MASKED_TEXT, TOKEN_MASKED, ViewOutputs


def masked_local_token_completion(
    recovered: Tensor,
    complete: Tensor,
    valid: Tensor,
    *,
    temperature: float = 0.03,
    directions: Directions = "both",
    group: ProcessGroup | None = None,
    gather: Gather = "exact",
    negatives: Negatives = "all",
    empty: Empty = "zero",
    count: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Contrast, in one modality, the fused tokens at masked positions with the same tokens of the view where this
    modality is whole, over all masked tokens of the batch (published objectives.py, compute_scl with token_recover).

    Args:
        recovered: (B, K, D), tokens at the masked positions.
        complete: (B, K, D), the same tokens of the view where the modality is whole; detached here.
        valid: (B, K) bool: captions have different numbers of masked tokens, K is the room for the most.
        temperature: of the InfoNCE.
        directions: as in ``ObjectiveConfig``.
        group: process group whose rows are negatives too.
        gather: gradient through the all-gather, see ``ops.completion_loss``.
        negatives: "published" contrasts within the rank, as the published image part does.
        empty: loss without any valid token: 0 with zero gradient, or NaN ("published").
        count: 0-d, valid tokens of a rank that the loss is divided by; None divides by those that are contrasted.
        backend: of the op.

    Returns:
        0-d loss.
    """
    valid = valid.flatten()
    op_gather = gather if negatives == "all" else None
    loss = ops.completion_loss(
        recovered.flatten(0, 1),
        complete.detach().flatten(0, 1),
        temperature=temperature,
        directions=op_directions(directions),
        reduction="mean" if count is None else "sum",
        valid=valid,
        group=group,
        gather=op_gather,
        backend=backend,
    )
    if count is not None:
        ranks = 1 if op_gather is None else world_size(group)
        loss = loss / (count * ranks).clamp_min(1e-9).to(loss.dtype)
    if empty == "zero":
        return loss
    anywhere = valid if op_gather is None else gather_rows(valid, group)
    return torch.where(anywhere.any(), loss, torch.nan)


def _features(inputs: LossInputs) -> dict[str, Tensor]:
    features = {
        "image_recovered": inputs.image(TOKEN_MASKED, "replaced"),
        "image_complete": inputs.image(MASKED_TEXT, "replaced").detach(),
        "image_valid": inputs.image_positions.valid["replaced"],
        "text_recovered": inputs.text(MASKED_TEXT, "completion"),
        "text_complete": inputs.text(MASKED_IMAGE, "completion").detach(),
        "text_valid": inputs.text_positions.valid["completion"],
    }
    if "place" in inputs.batch:
        # Parts of a global batch are padded to different lengths, and give each caption the same room all the same.
        config, ratio = inputs.network.config, inputs.options.text_mask_ratio
        room = completed_tokens(config.max_text_len, ratio) - features["text_valid"].shape[1]
        for name in ("text_recovered", "text_complete"):
            features[name] = F.pad(features[name], (0, 0, 0, room))
        features["text_valid"] = F.pad(features["text_valid"], (0, room))
    return features


def _contrast(
    features: Mapping[str, Tensor], options: ObjectiveConfig, backend: str, count: Tensor | None = None
) -> LossOutput:
    losses = {}
    for modality, negatives in (("image", options.negatives), ("text", "all")):
        loss = masked_local_token_completion(
            *(features[f"{modality}_{part}"] for part in ("recovered", "complete", "valid")),
            temperature=options.temperature,
            directions=options.directions,
            gather=options.gather,
            negatives=negatives,
            empty=options.empty_selections,
            # Every image has the same number of replaced patches.
            count=count if modality == "text" else None,
            backend=backend,
        )
        if options.empty_selections == "published":
            # The published code leaves a NaN out of the total.
            loss = torch.where(torch.isnan(loss), torch.zeros_like(loss), loss)
        losses[modality] = loss
    metrics = {f"mltc_{modality}": loss.detach() for modality, loss in losses.items()}
    return LossOutput(losses["image"] + losses["text"], metrics)


def _loss(inputs: LossInputs) -> LossOutput:
    count = None if inputs.counts is None else inputs.counts["completion"]
    return _contrast(_features(inputs), inputs.options, inputs.network.backend, count)


MLTC = Objective(
    name="mltc",
    title="MLTC, masked local token completion",
    loss=_loss,
    outputs=(
        ViewOutputs(TOKEN_MASKED, image=("replaced",)),
        ViewOutputs(MASKED_TEXT, text=("completion",), image=("replaced",)),
        ViewOutputs(MASKED_IMAGE, text=("completion",)),
    ),
    weight="mltc_weight",
    features=_features,
    contrast=_contrast,
    contrast_tokens=("completion", "replaced"),
)
