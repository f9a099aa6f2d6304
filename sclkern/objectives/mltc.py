"""MLTC, masked local token completion (GLSCL, arXiv 2306.07096): recover each masked token from the other modality."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sclkern import ops
from sclkern.distributed import gather as gather_rows
from sclkern.objectives._common import Directions, Empty, Gather, Negatives, op_directions
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
        valid=valid,
        group=group,
        gather=op_gather,
        backend=backend,
    )
    if empty == "zero":
        return loss
    anywhere = valid if op_gather is None else gather_rows(valid, group)
    return torch.where(anywhere.any(), loss, torch.nan)


def _part(
    recovered: Tensor, complete: Tensor, valid: Tensor, negatives: Negatives, options: ObjectiveConfig, backend: str
) -> Tensor:
    loss = masked_local_token_completion(
        recovered,
        complete,
        valid,
        temperature=options.temperature,
        directions=options.directions,
        gather=options.gather,
        negatives=negatives,
        empty=options.empty_selections,
        backend=backend,
    )
    if options.empty_selections == "published":
        # The published code leaves a NaN out of the total.
        return torch.where(torch.isnan(loss), torch.zeros_like(loss), loss)
    return loss


def _loss(inputs: LossInputs) -> LossOutput:
    options, backend = inputs.options, inputs.network.backend
    image = _part(
        inputs.image(TOKEN_MASKED, "replaced"),
        inputs.image(MASKED_TEXT, "replaced"),
        inputs.image_positions.valid["replaced"],
        options.negatives,
        options,
        backend,
    )
    text = _part(
        inputs.text(MASKED_TEXT, "completion"),
        inputs.text(MASKED_IMAGE, "completion"),
        inputs.text_positions.valid["completion"],
        "all",
        options,
        backend,
    )
    return LossOutput(image + text, {"mltc_image": image.detach(), "mltc_text": text.detach()})


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
)
