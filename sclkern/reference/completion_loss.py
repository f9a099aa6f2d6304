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
    normalize: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    r"""Cosine InfoNCE: each recovered feature must find its own complete feature among those of the batch.

    With s_ij = cos(r_i, c_j) / temperature:  L = mean_i [-log softmax_j(s_ij)]_(j=i), plus the same over columns when
    ``directions`` is "both" (summed, not averaged; reference: NormSoftmaxLoss of the published objectives.py). Of M
    columns, the first N belong to a row; those after them are negatives of every row, and have no loss of their own.

    Each term is computed as softplus(logsumexp_(j != i) s_ij - s_ii): the gradient of a confident positive then comes
    from the sum over the other pairs and not from softmax - 1, which cancels.

    Args:
        recovered: (N, D), or (G, N, D) for G separate contrasts whose losses are averaged.
        complete: (M, D) or (G, M, D), M >= N: row i belongs to column i, columns from N on are further negatives.
        temperature: float or 0-d tensor (learnable).
        directions: "both", or "recovered_to_complete" alone.
        reduction: "mean" over the valid rows of a group and then over groups, "sum" over all, or
            "none": (N,) or (G, N).
        valid: (N,) or (G, N) bool; the other rows, and the columns that belong to them, are neither anchors nor
            negatives, whatever they hold.
        same: (M,) int64 ids of the columns in every group, of which the first N are those of the rows too: other pairs
            of one id, such as two captions of the same image, are no negatives of one another, in either direction.
        normalize: divide features by their norms; otherwise s_ij = r_i . c_j / temperature.
        eps: smallest norm of a feature.

    Returns:
        Scalar, or the losses of the rows; 0 with zero gradient without rows, without valid rows and of a row without
        negatives.
    """
    rows, columns = recovered.shape[-2], complete.shape[-2]
    if valid is not None:
        # Not 0, whose norm has no second derivative.
        of_columns = F.pad(valid, (0, columns - rows), value=True)
        recovered = recovered.masked_fill(~valid[..., None], 1.0)
        complete = complete.masked_fill(~of_columns[..., None], 1.0)
    if normalize:
        recovered = recovered / recovered.norm(dim=-1, keepdim=True).clamp_min(eps)
        complete = complete / complete.norm(dim=-1, keepdim=True).clamp_min(eps)
    # Autocast would round similarities of 33 (cosine 1 at temperature 0.03) to bfloat16's steps of 0.25.
    with torch.autocast(recovered.device.type, enabled=False):
        similarity = recovered @ complete.mT / temperature
    excluded = torch.eye(rows, columns, dtype=torch.bool, device=similarity.device)
    if same is not None:
        excluded = excluded | (same[:rows, None] == same)
    if valid is not None:
        excluded = excluded | ~(valid[..., :, None] & of_columns[..., None, :])
    positive = similarity.diagonal(dim1=-2, dim2=-1)
    # Half the lowest number: minus infinity would make the gradient of a row without negatives NaN.
    others = similarity.masked_fill(excluded, torch.finfo(similarity.dtype).min / 2)
    losses = F.softplus(others.logsumexp(-1) - positive)
    if directions == "both":
        losses = losses + F.softplus(others[..., :rows].logsumexp(-2) - positive)
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
