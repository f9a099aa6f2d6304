"""``bias_gelu``."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: Literal["none", "tanh", "quick"] = "none") -> Tensor:
    """GELU of ``x + bias`` in the dtype of x.

    Args:
        x: (..., D).
        bias: (D,).
        approximate: "none" is the exact GELU, "tanh" its approximation, "quick" is x * sigmoid(1.702 x), CLIP's.

    Returns:
        (..., D).
    """
    x = x + bias.to(x.dtype)
    return x * torch.sigmoid(1.702 * x) if approximate == "quick" else F.gelu(x, approximate=approximate)
