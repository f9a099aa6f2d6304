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
    """Cross-entropy of hidden (..., D) @ weight (V, D)^T + bias (V,) with labels (...) int64: a scalar, or (...).

    The mean is that over the rows whose label is not ``ignore_index``; what the other rows of hidden hold is not used.
    0 with zero gradient without any such row. In float32 at least. With ``return_hits`` also the number of these rows
    whose arg max is the label, int64 without gradient.
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
