"""Losses of the downstream tasks, as functions of logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sclkern.objectives._common import at_least_float32, mean_cross_entropy


def visual_question_answering(logits: Tensor, targets: Tensor) -> Tensor:
    """VQA: binary cross-entropy on soft scores, summed over answers, averaged over questions (compute_vqa).

    Args:
        logits: (B, answers).
        targets: (B, answers), in [0, 1].

    Returns:
        0-d loss, float32 at least; 0 without rows.
    """
    loss = F.binary_cross_entropy_with_logits(at_least_float32(logits), targets, reduction="sum")
    return loss / max(len(targets), 1)


def visual_reasoning(logits: Tensor, labels: Tensor) -> Tensor:
    """NLVR2: cross-entropy (compute_nlvr2).

    Args:
        logits: (B, 2).
        labels: (B,) int64; rows with -100 are left out.

    Returns:
        0-d loss, float32 at least; 0 without rows.
    """
    return mean_cross_entropy(at_least_float32(logits), labels)
