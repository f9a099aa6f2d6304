"""``completion_loss``."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def completion_loss(
    recovered: Tensor,
    complete: Tensor,
    *,
    temperature: float | Tensor,
    directions: Literal["both", "recovered_to_complete"] = "both",
    reduction: Literal["mean", "sum", "none"] = "mean",
    valid: Tensor | None = None,
    same: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    r"""Cosine InfoNCE: each recovered feature must find its own complete feature among those of the batch.

    With s_ij = cos(r_i, c_j) / temperature:  L = mean_i [-log softmax_j(s_ij)]_(j=i), plus the same over columns when
    ``directions`` is "both" (summed, not averaged; reference: NormSoftmaxLoss of the published objectives.py).

    Each term is computed as softplus(logsumexp_(j != i) s_ij - s_ii): the gradient of a confident positive then comes
    from the sum over the other pairs and not from softmax - 1, which cancels.

    Args:
        recovered: (N, D), or (G, N, D) for G separate contrasts whose losses are averaged.
        complete: of the shape of recovered.
        temperature: float or 0-d tensor (learnable).
        directions: "both", or "recovered_to_complete" alone.
        reduction: "mean" over the valid rows of a group and then over groups, "sum" over all, or
            "none": (N,) or (G, N).
        valid: (N,) or (G, N) bool; the other rows are neither anchors nor negatives, whatever they hold.
        same: (N,) int64 ids, those of every group: other pairs of rows of one id, such as two captions of the same
            image, are no negatives of one another, in either direction.
        eps: smallest norm of a feature.

    Returns:
        Scalar, or the losses of the rows; 0 with zero gradient without rows, without valid rows and of a row without
        negatives.
    """
    if valid is not None:
        # Not 0, whose norm has no second derivative.
        unused = ~valid[..., None]
        recovered, complete = recovered.masked_fill(unused, 1.0), complete.masked_fill(unused, 1.0)
    recovered = recovered / recovered.norm(dim=-1, keepdim=True).clamp_min(eps)
    complete = complete / complete.norm(dim=-1, keepdim=True).clamp_min(eps)
    # Autocast would round similarities of 33 (cosine 1 at temperature 0.03) to bfloat16's steps of 0.25.
    with torch.autocast(recovered.device.type, enabled=False):
        similarity = recovered @ complete.mT / temperature
    size = similarity.shape[-1]
    excluded = torch.eye(size, dtype=torch.bool, device=similarity.device)
    if same is not None:
        excluded = excluded | (same[:, None] == same)
    if valid is not None:
        excluded = excluded | ~(valid[..., :, None] & valid[..., None, :])
    positive = similarity.diagonal(dim1=-2, dim2=-1)
    # Half the lowest number: minus infinity would make the gradient of a row without negatives NaN.
    others = similarity.masked_fill(excluded, torch.finfo(similarity.dtype).min / 2)
    losses = F.softplus(others.logsumexp(-1) - positive)
    if directions == "both":
        losses = losses + F.softplus(others.logsumexp(-2) - positive)
    return reduce_rows(losses, valid, reduction)


def reduce_rows(losses: Tensor, valid: Tensor | None, reduction: Literal["mean", "sum", "none"]) -> Tensor:
    """Reduce the losses of rows; invalid rows contribute zero.

    Args:
        losses: (N,) or (G, N).
        valid: bool of that shape, or None for all.
        reduction: as in ``completion_loss``.

    Returns:
        Scalar, 0 of no rows; or the losses with "none".
    """
    if valid is not None:
        losses = torch.where(valid, losses, 0.0)
    if reduction != "mean":
        return losses.sum() if reduction == "sum" else losses
    means = losses if valid is None else losses.sum(-1) / valid.sum(-1).clamp_min(1)
    # The mean of nothing is NaN, and the sum 0.
    return means.mean() if means.numel() else means.sum()
