"""``embed_patches``."""

from __future__ import annotations

import torch
from torch import Tensor


def embed_patches(
    images: Tensor,
    weight: Tensor,
    position: Tensor,
    cls: Tensor,
    *,
    temporal: Tensor | None = None,
    keep: Tensor | None = None,
    replace: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Tensor:
    """Patchify frames, embed only the kept patches, add positions, and put a CLS token before each frame.

    Args:
        images: (B, F, 3, S, S).
        weight: (D, 3, p, p), the convolution whose stride is its size.
        position: (1 + P, D), row 0 for the CLS. cls: (D,).
        temporal: (frames at most, D), added to every token of its frame, CLS included.
        keep: (B, K) int64, the same patches in every frame (a tube); the others are never embedded.
        replace: (B, P) bool, patches whose embedding is ``mask_token`` (D,), in every frame.

    Returns:
        (B, F * (1 + K), D), frame by frame.
    """
    batch, frames, channels, height, width = images.shape
    size = weight.shape[-1]
    patches = images.reshape(batch, frames, channels, height // size, size, width // size, size)
    patches = patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, frames, -1, channels * size * size)
    positions = position[1:].expand(batch, 1, -1, -1)
    if keep is not None:
        index = keep[:, None, :, None]
        patches = patches.gather(2, index.expand(-1, frames, -1, patches.shape[-1]))
        positions = positions.gather(2, index.expand(-1, 1, -1, position.shape[-1]))
        replace = None if replace is None else replace.gather(1, keep)
    tokens = patches.to(weight.dtype) @ weight.flatten(1).T
    if replace is not None:
        tokens = torch.where(replace[:, None, :, None], mask_token.to(tokens.dtype), tokens)
    tokens = tokens + positions
    first = (cls + position[0]).expand(batch, frames, 1, -1)
    tokens = torch.cat([first, tokens], dim=2)
    if temporal is not None:
        tokens = tokens + temporal[:frames, None, :]
    return tokens.flatten(1, 2)
