"""The cross-attention sub-layer with its projections, between images and captions."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.tools.specs._spec import AccuracyShape, Backward, Cost, Inputs, OpSpec, Values, kernels, normal
from sclkern.tools.specs._workload import (
    ATTENTION_BACKWARD,
    HEADS,
    LARGEST_SCORE,
    WIDTH,
    attention_sizes,
    captions,
    sequence_lengths,
)


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return normal(*shape, dtype=dtype, device=device, scale=scale)

    width = v.get("W", WIDTH)
    # Weights of the scale of trained ones keep the scores within a few units.
    inputs: Inputs = {"x": tensor(v["B"], v["Lq"], width), "context": tensor(v["B"], v["Lk"], width)}
    inputs |= {"in_weight": tensor(3 * width, width, scale=0.04), "in_bias": tensor(3 * width, scale=0.1)}
    inputs |= {"out_weight": tensor(width, width, scale=0.04), "out_bias": tensor(width, scale=0.1)}
    if "k" in v["text"]:
        tokens = torch.tensor(captions(v["B"], v.get("longest")), device=device)
        inputs["key_padding_mask"] = torch.arange(v["Lk"], device=device) < tokens[:, None]
    return inputs | {"num_heads": v.get("H", HEADS)}


def _small_inputs(length: int, device: str) -> Inputs:
    inputs: Inputs = {"x": normal(2, length, 64, device=device), "context": normal(2, 5, 64, device=device)}
    inputs |= {"in_weight": normal(192, 64, device=device) / 8, "in_bias": normal(192, device=device)}
    inputs |= {"out_weight": normal(64, 64, device=device) / 8, "out_bias": normal(64, device=device)}
    mask = torch.arange(5, device=device) < torch.tensor([[5], [4]], device=device)
    return inputs | {"num_heads": 2, "key_padding_mask": mask}


def _cost(v: Values, element_size: int) -> Cost:
    """The sub-layer in its cheaper form: with every projection, or with those of the longer side absorbed."""
    queries, keys = sequence_lengths(v)
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
    projected = (4 * (sum(queries) + sum(keys)) * WIDTH**2, 4 * pairs * WIDTH)
    # Scores and weighted sums over the full width for every head.
    absorbed = (8 * min(sum(queries), sum(keys)) * WIDTH**2, 4 * pairs * HEADS * WIDTH)
    products, core = min(projected, absorbed, key=sum)
    weights, row = 4 * WIDTH**2 * element_size, WIDTH * element_size
    forward_bytes = (2 * sum(queries) + sum(keys)) * row + weights
    backward_bytes = (3 * sum(queries) + 2 * sum(keys)) * row + 2 * weights
    return Cost(forward_bytes, products + core, backward_bytes, 2 * products + ATTENTION_BACKWARD * core)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    x, context = inputs["x"], inputs["context"]
    weight = x.new_empty((inputs["num_heads"], *context.shape))
    absorbed = weight, weight[..., 0], weight
    rest = inputs.get("key_padding_mask"), seed, dropout_p
    launchers = kernels("cross_attention")
    out = launchers.cross_attention_forward(x, *absorbed, inputs["out_bias"], *rest)
    return lambda: launchers.cross_attention_backward(out, x, *absorbed, *rest)


def _shape(keys: int) -> AccuracyShape:
    values = {"B": 64, "Lq": 325, "Lk": keys, "text": "k", "longest": keys}
    return AccuracyShape(f"325x{keys}", values, kernel_options={"absorb": "keys"}, magnitude=LARGEST_SCORE)


SPEC = OpSpec(
    name="cross_attention",
    definition=reference.cross_attention,
    kernels=("cross_attention", "cross_attention_queries"),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    sizes=attention_sizes(64, 0.1, "325x13", "13x325"),
    cpu_sizes=attention_sizes(2, 0.0, "325x13", "13x325"),
    accuracy=(_shape(13), _shape(18)),
    float32=("in_weight", "in_bias", "out_weight", "out_bias"),
    dropout=True,
)
