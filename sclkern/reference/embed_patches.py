"""``embed_patches``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unfold_patches(images: Tensor, size: int, keep: Tensor | None = None) -> Tensor:
    """Cut images into patches; only kept patches are copied.

    Args:
        images: (B, F, C, S, S).
        size: p, side of a patch in pixels.
        keep: (B, K) int64, the patches to keep; None keeps all.

    Returns:
        (B, F, K, C * p * p).
    """
    batch, _, _, height, width = images.shape
    grid = images.unflatten(4, (width // size, size)).unflatten(3, (height // size, size))
    if keep is None:
        return grid.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
    sample = torch.arange(batch, device=images.device)[:, None]
    row, column = keep // (width // size), keep % (width // size)
    return grid.permute(0, 3, 5, 1, 2, 4, 6)[sample, row, column].transpose(1, 2).flatten(3)


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
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Patchify frames, embed only the kept patches, add positions, put a CLS token before each frame, and normalise.

    Args:
        images: (B, F, 3, S, S).
        weight: (D, 3, p, p), the convolution whose stride is its size.
        position: (1 + P, D), row 0 for the CLS.
        cls: (D,).
        temporal: (frames at most, D), added to every token of its frame, CLS included.
        keep: (B, K) int64, the same patches in every frame (a tube); the others are never embedded.
        replace: (B, P) bool, patches whose embedding is ``mask_token``, in every frame.
        mask_token: (D,), required with ``replace``.
        norm_weight: (D,), of a LayerNorm over each token (CLIP's ``ln_pre``); None for no normalisation.
        norm_bias: (D,), given together with ``norm_weight``.
        eps: added to the variance.

    Returns:
        (B, F * (1 + K), D), frame by frame.
    """
    batch, frames = images.shape[:2]
    patches = unfold_patches(images, weight.shape[-1], keep)
    positions = position[1:].expand(batch, 1, -1, -1)
    if keep is not None:
        positions = positions.gather(2, keep[:, None, :, None].expand(-1, 1, -1, position.shape[-1]))
        replace = None if replace is None else replace.gather(1, keep)
    # One product: torch multiplies frame by frame where no gradient is needed, which rounds otherwise on some CPUs.
    tokens = (patches.to(weight.dtype).flatten(0, 2) @ weight.flatten(1).T).unflatten(0, patches.shape[:3])
    if replace is not None and mask_token is not None:
        tokens = torch.where(replace[:, None, :, None], mask_token.to(tokens.dtype), tokens)
    tokens = tokens + positions
    first = (cls + position[0]).expand(batch, frames, 1, -1)
    tokens = torch.cat([first, tokens], dim=2)
    if temporal is not None:
        tokens = tokens + temporal[:frames, None, :]
    tokens = tokens.flatten(1, 2)
    if norm_weight is None or norm_bias is None:
        return tokens
    return F.layer_norm(tokens, tokens.shape[-1:], norm_weight.to(tokens.dtype), norm_bias.to(tokens.dtype), eps)
