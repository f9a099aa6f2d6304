"""What several objectives share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.objectives.config import ObjectiveConfig

Directions = Literal["both", "recovered_to_complete", "published"]
Gather = Literal["exact", "published"] | None
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


def same_images(batch: Mapping[str, Any], options: ObjectiveConfig) -> dict[str, Tensor]:
    """The feature by which a contrast leaves other pairs of the same image out of its negatives.

    Args:
        batch: of the step.
        options: ``same_image``.

    Returns:
        "same", (B,) int64; empty where such pairs are negatives, or the batch does not say which images are the same.
    """
    return {"same": batch["image_id"]} if options.same_image == "ignore" and "image_id" in batch else {}


def completed_tokens(length: int, ratio: float) -> int:
    """The most tokens of a caption that are completed.

    Args:
        length: of the caption.
        ratio: of ``ObjectiveConfig.text_mask_ratio``.

    Returns:
        Their number.
    """
    return min(length, int(max(length - 2, 0) * ratio) + 1)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy averaged over rows; 0 with zero gradient where there are none, of which torch's mean is NaN.

    Args:
        logits: (N, C) or (N, C, K).
        labels: (N,) or (N, K) int64; rows with -100 are left out.

    Returns:
        0-d loss.
    """
    return F.cross_entropy(logits, labels, reduction="sum") / labels.ne(-100).sum().clamp_min(1)
