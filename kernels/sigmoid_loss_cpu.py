"""``sigmoid_loss`` on a CPU without the kernels: row blocks of logits, with explicit gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of a tile.
TILE = 2**22


@torch.autocast("cpu", enabled=False)
def forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the launcher of the kernels computes, in the dtype of ``scale``."""
    sums = torch.zeros(3, dtype=torch.float64)
    images, texts = image.to(scale.dtype), text.to(scale.dtype)
    for start in range(offset, offset + rows, _step(len(text))):
        products = images[start : min(start + _step(len(text)), offset + rows)] @ texts.T
        logits = products * scale + bias
        losses, slopes = F.softplus(logits), logits.sigmoid()
        positive = logits.diagonal(start)
        losses.diagonal(start).copy_(F.softplus(-positive))
        slopes.diagonal(start).copy_(-torch.sigmoid(-positive))
        for place, values in enumerate((losses, slopes * products, slopes)):
            sums[place] += values.sum(dtype=torch.float64)
    loss, by_scale, by_bias = (sums / max(len(image), 1)).to(scale.dtype).unbind()
    return loss.clone(), by_scale.clone(), by_bias.clone()


@torch.autocast("cpu", enabled=False)
def gradient(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, factor: Tensor, offset: int, rows: int) -> Tensor:
    """What the launcher of the kernels computes."""
    lefts, rights = x.to(scale.dtype), y.to(scale.dtype)
    grad = torch.empty((rows, x.shape[1]), dtype=scale.dtype)
    for start in range(offset, offset + rows, _step(len(y))):
        block = slice(start, min(start + _step(len(y)), offset + rows))
        logits = torch.addmm(bias, lefts[block] * scale, rights.T)
        slopes = logits.sigmoid()
        slopes.diagonal(start).copy_(-torch.sigmoid(-logits.diagonal(start)))
        grad[block.start - offset : block.stop - offset] = slopes @ rights
    return (grad * factor).to(x.dtype)


def _step(columns: int) -> int:
    return max(1, min(1024, TILE // max(columns, 1)))
