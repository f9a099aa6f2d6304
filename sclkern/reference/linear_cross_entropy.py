"""``linear_cross_entropy``."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_hits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight.T + bias`` with ``labels``, in float32 at least.

    Args:
        hidden: (..., D).
        weight: (V, D).
        bias: (V,), or None.
        labels: (...) int64.
        ignore_index: label of the rows that take no part, whatever they hold.
        reduction: "mean" over the other rows, "sum", or "none".
        return_hits: return also how many of the other rows have their label as arg max.

    Returns:
        Scalar, or (...) with "none"; 0 with zero gradient when every row is ignored. With ``return_hits`` also an int64
        scalar without gradient.
    """
    used = labels != ignore_index
    logits = F.linear(hidden.masked_fill(~used[..., None], 0.0), weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, weight.shape[0])
    losses = F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        loss = losses.reshape(labels.shape)
    else:
        loss = losses.sum() / (used.sum().clamp_min(1) if reduction == "mean" else 1)
    if not return_hits:
        return loss
    return loss, ((logits.detach().argmax(-1) == labels.reshape(-1)) & used.reshape(-1)).sum()
