"""ITM, image-text matching: does the image belong to the caption?

``ObjectiveConfig.itm_negatives`` says where negative images come from. ``sclkern.step.masks`` draws which rows get one,
and ``negative_images`` there chooses the image if it is another row's; ``batch["false_image"]`` comes from the loader.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sclkern.models.config import SCLConfig
from sclkern.objectives._common import at_least_float32, mean_cross_entropy
from sclkern.objectives.inputs import LossInputs
from sclkern.objectives.objective import LossOutput, Objective
from sclkern.objectives.views import MATCHING, ViewOutputs


def image_text_matching(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute L = -mean_i log softmax(logits_i)[label_i] (published objectives.py, compute_itm).

    Args:
        logits: (B, 2), from the pooled CLS of both streams.
        labels: (B,) int64, 1 = the image belongs to the caption.

    Returns:
        0-d loss, float32 at least; 0 without rows.
    """
    return mean_cross_entropy(at_least_float32(logits), labels)


def _loss(inputs: LossInputs) -> LossOutput:
    network, labels = inputs.network, inputs.match_labels
    assert labels is not None  # drawn for the view's image variant "matching"
    logits = network.itm_head(network.pool(inputs.text(MATCHING)[:, 0], inputs.image(MATCHING)))
    accuracy = (logits.detach().argmax(-1) == labels).float().sum() / max(len(labels), 1)
    return LossOutput(image_text_matching(logits, labels), {"itm_accuracy": accuracy})


def _flops(config: SCLConfig, tokens: Mapping[str, int]) -> float:
    poolers, head = 2 * 2 * config.width**2, 2 * 2 * config.width * 2
    return poolers + head


ITM = Objective(
    name="itm",
    title="ITM, image-text matching",
    loss=_loss,
    outputs=(ViewOutputs(MATCHING, text=("cls",), image=("cls",)),),
    heads=("itm",),
    flops=_flops,
)
