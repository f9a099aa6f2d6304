"""What several objectives share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Directions = Literal["both", "recovered_to_complete", "published"]
Gather = Literal["exact", "published"]
Negatives = Literal["all", "published"]
Empty = Literal["zero", "published"]


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; float64 stays float64, for tests.

    Args:
        x: any shape.

    Returns:
        Like x.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def op_directions(directions: Directions) -> Literal["both", "recovered_to_complete"]:
    """Translate the option into the argument of ``ops.completion_loss``.

    Args:
        directions: the published code sums both.

    Returns:
        The argument.
    """
    return "recovered_to_complete" if directions == "recovered_to_complete" else "both"
