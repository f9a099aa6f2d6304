"""``sigmoid_loss``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(image: Tensor, text: Tensor, *, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    r"""SigLIP's loss (Zhai et al., arXiv 2303.15343, algorithm 1): of each image and each text, whether they match.

    L = 1/N sum_ij -log sigmoid(z_ij (scale image_i . text_j + bias)), with z_ij = 1 where i = j and -1 elsewhere.

    Args:
        image: (N, D), taken as it is: callers normalise.
        text: (N, D); row i belongs to row i of image.
        scale: factor of the dot products, a float or a 0-d tensor (learnable).
        bias: added to them, likewise.

    Returns:
        Scalar; 0 without rows.
    """
    # Autocast would round logits, whose largest is about scale, to bfloat16's steps.
    with torch.autocast(image.device.type, enabled=False):
        logits = scale * (image @ text.mT) + bias
    matches = torch.eye(len(image), dtype=torch.bool, device=logits.device)
    return F.softplus(torch.where(matches, -logits, logits)).sum() / max(len(image), 1)
