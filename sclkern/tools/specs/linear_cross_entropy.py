"""Cross-entropy of the masked tokens' logits over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.tools.specs._spec import AccuracyShape, Backward, Cost, Inputs, OpSpec, Values, kernels, normal
from sclkern.tools.specs._workload import VOCABULARY, WIDTH, row_sizes

# Labels of the reference that count for nothing.
IGNORED = -100


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    width = v.get("W", WIDTH)
    hidden = normal(v["N"], width, dtype=dtype, device=device)
    weight = normal(VOCABULARY, width, dtype=dtype, device=device, scale=0.02)
    bias = normal(VOCABULARY, dtype=dtype, device=device, scale=0.02)
    labels = torch.randint(VOCABULARY, (v["N"],), device=device)
    if "ignored" in v:
        labels[:: v["ignored"]] = IGNORED
    return {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels}


def _small_inputs(length: int, device: str) -> Inputs:
    labels = torch.arange(length, device=device) % 11
    labels[1] = IGNORED
    hidden, weight = normal(length, 16, device=device), normal(11, 16, device=device)
    return {"hidden": hidden, "weight": weight, "bias": normal(11, device=device), "labels": labels}


def _cost(v: Values, element_size: int) -> Cost:
    """The weight is read once forward; in the backward it is read again and its gradient written."""
    weight, hidden = VOCABULARY * WIDTH * element_size, v["N"] * WIDTH * element_size
    flops = 2 * v["N"] * VOCABULARY * WIDTH
    return Cost(weight + hidden, flops, 2 * weight + 2 * hidden, 2 * flops)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    labels, vocabulary = inputs["labels"], len(inputs["weight"])
    count, width = len(labels), -(-vocabulary // 64) * 64
    logits = inputs["hidden"].new_empty((count, width))
    losses, lse, margin = torch.empty((3, count), device=labels.device)
    bias = logits.new_empty(width)[:vocabulary]
    hits = torch.empty(count, dtype=torch.int32, device=labels.device)
    launchers = kernels("linear_cross_entropy")
    launchers.statistics(logits, bias, labels, IGNORED, losses, lse, margin, hits, vocabulary)
    loss, divisor, _ = launchers.reduce(losses, hits, labels, IGNORED, True)
    rest = logits, bias, labels, lse, margin, IGNORED, 0, logits, bias, vocabulary
    return lambda: launchers.gradient(loss, divisor, *rest)


SPEC = OpSpec(
    name="linear_cross_entropy",
    definition=reference.linear_cross_entropy,
    kernels=("linear_cross_entropy",),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    sizes=row_sizes((125, 832, 3200), 125),
    cpu_sizes=row_sizes((16, 125), 125),
    accuracy=tuple(AccuracyShape(str(rows), {"N": rows, "ignored": 7}, magnitude=8.0) for rows in (125, 3200)),
    float32=("weight", "bias"),
)
