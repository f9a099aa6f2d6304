"""The stages of ``embed_patches`` on a CPU: the interface of its kernels, with the formulas of the backward written
out, because autograd does not work inside a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern.reference.embed_patches import unfold_patches as unfold


def _replaced(keep: Tensor | None, replace: Tensor | None) -> Tensor | None:
    """(B, 1, K, 1) bool."""
    if replace is None:
        return None
    return (replace if keep is None else replace.gather(1, keep))[:, None, :, None]


def unfold_patches(
    images: Tensor, size: int, dtype: torch.dtype, keep: Tensor | None, replace: Tensor | None
) -> Tensor:
    """images (B, F, C, S, S): (B * F * K, C * size * size) of ``dtype``, zero where ``replace`` (B, P)."""
    patches = unfold(images, size, keep).to(dtype)
    replaced = _replaced(keep, replace)
    return (patches if replaced is None else patches.masked_fill(replaced, 0.0)).flatten(0, 2)


def _total(tokens: Tensor, parameters: dict[str, Tensor | None], samples: int, frames: int) -> Tensor:
    """The rows before normalisation, (B, F, 1 + K, D) float32."""
    position, keep = parameters["position"].float(), parameters["keep"]
    kept = position.shape[0] - 1 if keep is None else keep.shape[1]
    tokens = tokens.float().view(samples, frames, kept, tokens.shape[1])
    replaced = _replaced(keep, parameters["replace"])
    if replaced is not None:
        tokens = torch.where(replaced, parameters["mask_token"].float(), tokens)
    tokens = tokens + (position[1:] if keep is None else position[1 + keep][:, None])
    first = (parameters["cls"].float() + position[0]).expand(samples, frames, 1, -1)
    total = torch.cat([first, tokens], dim=2)
    return total if parameters["temporal"] is None else total + parameters["temporal"][:frames, None].float()


def add_and_normalise(
    tokens: Tensor, parameters: dict[str, Tensor | None], samples: int, frames: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``sclkern.kernels.embed_patches.add_and_normalise``."""
    total = _total(tokens, parameters, samples, frames)
    mean = rstd = total.new_empty((0,))
    if parameters["norm_weight"] is not None:
        mean, rstd = total.mean(-1, keepdim=True), (total.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        total = (total - mean) * rstd * parameters["norm_weight"].float() + parameters["norm_bias"].float()
    return total.flatten(1, 2).to(dtype), mean.flatten(), rstd.flatten().clone()


def add_and_normalise_backward(
    grad_out: Tensor,
    tokens: Tensor,
    parameters: dict[str, Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    frames: int,
) -> dict[str, Tensor | None]:
    """As ``sclkern.kernels.embed_patches_backward.add_and_normalise_backward``."""
    samples, _, columns = grad_out.shape
    keep, replaced = parameters["keep"], _replaced(parameters["keep"], parameters["replace"])
    grad = grad_out.float().view(samples, frames, -1, columns)
    gradients = dict.fromkeys(("norm_weight", "norm_bias", "mask_token", "temporal"))
    if parameters["norm_weight"] is not None:
        mean, rstd = (statistic.view(samples, frames, -1, 1) for statistic in (mean, rstd))
        normal = (_total(tokens, parameters, samples, frames) - mean) * rstd
        gradients |= {"norm_weight": (grad * normal).sum((0, 1, 2)), "norm_bias": grad.sum((0, 1, 2))}
        grad = grad * parameters["norm_weight"].float()
        grad = (grad - grad.mean(-1, keepdim=True) - normal * (grad * normal).mean(-1, keepdim=True)) * rstd
    if parameters["temporal"] is not None:
        gradients["temporal"] = grad.sum((0, 2))
    grad_tokens = grad[:, :, 1:]
    position = grad.new_zeros(parameters["position"].shape)
    position[0] = grad[:, :, 0].sum((0, 1))
    if keep is None:
        position[1:] = grad_tokens.sum((0, 1))
    else:
        position.index_add_(0, 1 + keep.flatten(), grad_tokens.sum(1).flatten(0, 1))
    if replaced is not None:
        gradients["mask_token"] = grad_tokens.masked_fill(~replaced, 0.0).sum((0, 1, 2))
        grad_tokens = grad_tokens.masked_fill(replaced, 0.0)
    return gradients | {"tokens": grad_tokens.flatten(0, 2).to(tokens.dtype), "position": position}
