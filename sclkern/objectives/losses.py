"""The objectives as pure functions of features.

Sources: SCL, arXiv 2211.13437; GLSCL, arXiv 2306.07096; their code (IIGROUP/SCL at cd0d819), whose files are named
below. Dimensions: B batch, F frames, D width, L length, K selected positions, V vocabulary, N rows of a contrast.
``backend`` is that of the ops.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import ops
from sclkern.distributed import gather as gather_rows

Directions = Literal["both", "recovered_to_complete", "reference"]
Gather = Literal["exact", "reference"]


def image_text_matching(logits: Tensor, labels: Tensor) -> Tensor:
    """ITM: L = -mean_i log softmax(logits_i)[label_i] (objectives.py compute_itm).

    Args:
        logits: (B, 2), from the pooled CLS of both streams. labels: (B,) int64, 1 = the pair belongs together.
    """
    return F.cross_entropy(_precise(logits), labels)


def masked_language_modeling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    empty: Literal["zero", "reference"] = "zero",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """MLM: L = -mean over targets of log softmax(hidden W^T + b)[label] (objectives.py compute_mlm).

    Args:
        hidden: (..., D), what the decoder reads. weight: (V, D) and bias: (V,) of the decoder.
        labels: (...) int64, -100 where there is nothing to predict.
        empty: loss without any target: 0 with zero gradient, or NaN ("reference").

    Returns:
        The loss, and how many targets have the highest logit (int64, no gradient).
    """
    loss, hits = ops.linear_cross_entropy(hidden, weight, bias, labels, return_hits=True, backend=backend)
    return (loss if empty == "zero" else torch.where(labels.ne(-100).any(), loss, torch.nan)), hits


def image_text_contrast(
    image: Tensor, text: Tensor, temperature: Tensor, *, group=None, gather: Gather = "exact", backend: str = "auto"
) -> Tensor:
    """ITC: symmetric InfoNCE of projected unimodal CLS features, both directions summed (objectives.py compute_con).

    The step weights it by 0.5, which makes it the usual average of the directions.

    Args:
        image, text: (B, E), row i of one belongs to row i of the other. temperature: 0-d, learnable.
        group: process group whose rows are negatives too.
    """
    return ops.completion_loss(image, text, temperature=temperature, group=group, gather=gather, backend=backend)


def masked_vision_semantic_completion(
    recovered: Tensor,
    complete: Tensor,
    *,
    temperature: float = 0.03,
    directions: Directions = "both",
    frame_norm: Literal["features", "reference"] = "features",
    group=None,
    gather: Gather = "exact",
    backend: str = "auto",
) -> Tensor:
    """MVSC: InfoNCE of the image CLS recovered from a masked image and the whole text against the image CLS of the
    whole image, for each frame index apart, averaged over frames (objectives.py compute_scl, compute_scl_video).

    Args:
        recovered: (B, F, D), fused CLS of the pass with dropped patches.
        complete: (B, F, D), fused CLS of the pass with masked words; detached here.
        frame_norm: "reference" normalises over frames instead of features, as compute_scl_video does.
    """
    complete = complete.detach()
    if frame_norm == "features":
        return ops.completion_loss(
            recovered.transpose(0, 1),
            complete.transpose(0, 1),
            temperature=temperature,
            directions=_direction(directions),
            group=group,
            gather=gather,
            backend=backend,
        )
    recovered, complete = gather_rows(recovered, group, gather), gather_rows(complete, group, gather)
    recovered, complete = _precise(recovered).transpose(0, 1), _precise(complete).transpose(0, 1)
    recovered = recovered / recovered.norm(dim=0, keepdim=True).clamp_min(1e-8)
    complete = complete / complete.norm(dim=0, keepdim=True).clamp_min(1e-8)
    similarity = recovered @ complete.mT / temperature
    diagonal = torch.arange(similarity.shape[1], device=similarity.device).expand(similarity.shape[:2])
    return F.cross_entropy(similarity.mT, diagonal) + (
        F.cross_entropy(similarity, diagonal) if _direction(directions) == "both" else 0.0
    )


def masked_language_semantic_completion(
    recovered: Tensor,
    complete: Tensor,
    *,
    temperature: float = 0.03,
    directions: Directions = "both",
    group=None,
    gather: Gather = "exact",
    negatives: Literal["all", "reference"] = "all",
    backend: str = "auto",
) -> Tensor:
    """MLSC: InfoNCE of the text CLS recovered from masked words and the whole image against the text CLS of the whole
    text (objectives.py compute_scl).

    Args:
        recovered: (B, D), fused CLS of the pass with masked words.
        complete: (B, D), fused CLS of the pass with dropped patches; detached here.
        negatives: "reference" contrasts within the rank.
    """
    return ops.completion_loss(
        recovered,
        complete.detach(),
        temperature=temperature,
        directions=_direction(directions),
        group=group,
        gather=gather if negatives == "all" else None,
        backend=backend,
    )


def masked_local_token_completion(
    recovered: Tensor,
    complete: Tensor,
    valid: Tensor,
    *,
    temperature: float = 0.03,
    directions: Directions = "both",
    group=None,
    gather: Gather = "exact",
    negatives: Literal["all", "reference"] = "all",
    empty: Literal["zero", "reference"] = "zero",
    backend: str = "auto",
) -> Tensor:
    """MLTC, one modality: InfoNCE of the fused tokens at masked places against the same tokens of the view that is
    whole in this modality, over all masked tokens of the batch (GLSCL; objectives.py compute_scl with token_recover).

    Args:
        recovered, complete: (B, K, D), tokens at the selected places; ``complete`` is detached here.
        valid: (B, K) bool: captions have different numbers of masked words, K is the room for the longest.
        negatives: "reference" contrasts within the rank (the published image part).
        empty: loss without any valid token: 0 with zero gradient, or NaN ("reference").
    """
    valid = valid.flatten()
    gather = gather if negatives == "all" else None
    loss = ops.completion_loss(
        recovered.flatten(0, 1),
        complete.detach().flatten(0, 1),
        temperature=temperature,
        directions=_direction(directions),
        valid=valid,
        group=group,
        gather=gather,
        backend=backend,
    )
    if empty == "zero":
        return loss
    anywhere = valid if gather is None else gather_rows(valid, group)
    return torch.where(anywhere.any(), loss, torch.nan)


def visual_question_answering(logits: Tensor, targets: Tensor) -> Tensor:
    """VQA: binary cross-entropy on soft scores, summed over answers, averaged over questions (compute_vqa).

    Args:
        logits, targets: (B, answers); targets in [0, 1].
    """
    return F.binary_cross_entropy_with_logits(_precise(logits), targets) * targets.shape[1]


def visual_reasoning(logits: Tensor, labels: Tensor) -> Tensor:
    """NLVR2: cross-entropy of (B, 2) logits against (B,) int64 labels (compute_nlvr2)."""
    return F.cross_entropy(_precise(logits), labels)


def _precise(x: Tensor) -> Tensor:
    """In float32 at least: float64 stays, for the truth of a test."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _direction(directions: Directions) -> Literal["both", "recovered_to_complete"]:
    return "recovered_to_complete" if directions == "recovered_to_complete" else "both"
