"""Contrast over ranks: gather features, and say what gradient comes back."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, group, scale: float) -> Tensor:
        ctx.rank, ctx.rows, ctx.scale = dist.get_rank(group), features.shape[0], scale
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, features.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Every rank holds the same loss of the same features, so its own slice is the whole gradient of its rows.
        own = grad[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]
        return own * ctx.scale, None, None


def gather(features: Tensor, group=None, mode: Literal["exact", "reference"] = "exact") -> Tensor:
    """Stack the rows of all ranks: (B, ...) to (world * B, ...), rank by rank; B is the same on each.

    ``mode`` is the gradient: "exact" multiplies this rank's slice by the world size, so that DDP's mean over ranks is
    the gradient of one big batch; "reference" leaves the slice as it is, 1/world of that (AllGather_multi in the
    published dist_utils.py). Without an initialised process group the features come back as they are.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return features
    if not features.is_floating_point():
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, features.contiguous(), group=group)
        return torch.cat(parts)
    return _Gather.apply(features, group, dist.get_world_size(group) if mode == "exact" else 1)
