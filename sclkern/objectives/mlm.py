"""MLM, masked language modelling: predict masked tokens of the caption from the others and the image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sclkern import ops
from sclkern.models.config import SCLConfig
from sclkern.objectives import views
from sclkern.objectives._common import Empty
from sclkern.objectives.inputs import LossInputs
from sclkern.objectives.objective import LossOutput, Objective


def masked_language_modeling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    empty: Empty = "zero",
    count: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute L = -mean over targets of log softmax(hidden W^T + b)[label] (published objectives.py, compute_mlm).

    Args:
        hidden: (..., D), the decoder's input.
        weight: (V, D) of the decoder.
        bias: (V,) of the decoder.
        labels: (...) int64, -100 where there is nothing to predict.
        empty: loss without any target: 0 with zero gradient, or NaN ("published").
        count: 0-d, what the sum over targets is divided by; None divides by their number.
        backend: of the op.

    Returns:
        The loss, and for how many targets the right token has the highest logit (int64, no gradient).
    """
    loss, hits = ops.linear_cross_entropy(
        hidden,
        weight,
        bias,
        labels,
        reduction="mean" if count is None else "sum",
        return_hits=True,
        backend=backend,
    )
    if count is not None:
        loss = loss / count.clamp_min(1e-9).to(loss.dtype)
    return (loss if empty == "zero" else torch.where(labels.ne(-100).any(), loss, torch.nan)), hits


def _loss(inputs: LossInputs) -> LossOutput:
    index, valid = inputs.text_positions.index["mlm"], inputs.text_positions.valid["mlm"]
    labels = torch.where(valid, inputs.batch["text_ids"].gather(1, index), -100)
    head = inputs.network.mlm_head
    loss, hits = masked_language_modeling(
        head.transform(inputs.text(views.MLM, "mlm")),
        head.decoder.weight,
        head.decoder.bias,
        labels,
        empty=inputs.options.empty_selections,
        count=None if inputs.counts is None else inputs.counts["mlm"],
        backend=inputs.network.backend,
    )
    return LossOutput(loss, {"mlm_accuracy": hits / valid.sum().clamp_min(1)})


def _flops(config: SCLConfig, tokens: Mapping[str, int]) -> float:
    return tokens["mlm"] * 2 * config.width * (config.width + config.vocab_size)


MLM = Objective(
    name="mlm",
    title="MLM, masked language modelling",
    loss=_loss,
    outputs=(views.ViewOutputs(views.MLM, text=("mlm",)),),
    heads=("mlm",),
    flops=_flops,
)
