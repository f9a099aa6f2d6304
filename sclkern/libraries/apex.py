"""LayerNorm and AdamW of NVIDIA's apex, where it is installed. The package index has another library of that name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sclkern.libraries._lookup import Found

# What it computes on; tests of stand-ins add others.
DEVICE_TYPES = {"cuda"}
REMEDY = "build NVIDIA's apex with its CUDA extensions, https://github.com/NVIDIA/apex#from-source"
_NORM_ARGUMENTS = ("input", "weight", "bias", "normalized_shape", "eps")
_ADAM_ARGUMENTS = ("params", "betas", "eps", "adam_w_mode", "bias_correction")
FUSED_LAYER_NORM = Found(
    "apex", "apex.normalization.fused_layer_norm", "fused_layer_norm_affine", _NORM_ARGUMENTS, REMEDY,
    "fused_layer_norm_cuda",
)  # fmt: skip
FUSED_ADAM = Found("apex", "apex.optimizers", "FusedAdam", _ADAM_ARGUMENTS, REMEDY, "amp_C")


def layer_norm_problems(device: torch.device) -> tuple[str, ...]:
    """Why apex's LayerNorm cannot compute on this device; none if it can."""
    return _problems(FUSED_LAYER_NORM, device)


def adam_problems(device: torch.device) -> tuple[str, ...]:
    """Why apex's FusedAdam cannot update parameters on this device; none if it can."""
    return _problems(FUSED_ADAM, device)


def _problems(used: Found, device: torch.device) -> tuple[str, ...]:
    found = () if (missing := used.problem()) is None else (missing,)
    return found if device.type in DEVICE_TYPES else (*found, f"tensors on {device}, apex needs a CUDA GPU")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension by apex's kernel; one derivative.

    As torch's own, it computes in the dtype of the parameters under autocast; apex alone would round them, and the
    residual stream, to that of products.

    Args:
        x: (..., D).
        weight: (D,).
        bias: (D,), in the dtype of weight.
        eps: added to the variance.

    Returns:
        (..., D) in the dtype of weight.

    Raises:
        ValueError: apex, or what it needs, is missing.
    """
    if problems := layer_norm_problems(x.device):
        raise ValueError(f"layer_norm='apex': cannot run: {'; '.join(problems)}")
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = FUSED_LAYER_NORM.call(x.to(weight.dtype), weight, bias, weight.shape, eps)
    return out


def build_adam(groups: list[dict[str, Any]], device: torch.device, **options: Any) -> torch.optim.Optimizer:
    """apex's FusedAdam as AdamW.

    Args:
        groups: parameter groups, each with its ``lr`` and ``weight_decay``.
        device: of the parameters; its buffers are there.
        **options: ``betas`` and ``eps``.

    Returns:
        The optimizer. ``zero_grad`` takes no argument; steps are counted in the groups, as ``step``.
    """
    # It allocates on the current device.
    with torch.cuda.device(device if device.type == "cuda" else -1):
        optimizer: torch.optim.Optimizer = FUSED_ADAM.call(groups, **options, adam_w_mode=True, bias_correction=True)
    return optimizer
