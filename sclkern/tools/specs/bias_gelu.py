"""Bias and GELU between the linear layers of a feed-forward block."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.tools.specs._spec import (
    AccuracyShape,
    Backward,
    Cost,
    Inputs,
    OpSpec,
    Size,
    Values,
    kernels,
    normal,
)
from sclkern.tools.specs._workload import WIDTH


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    options = {"approximate": v["approximate"]} if "approximate" in v else {}
    x = normal(v["T"], 4 * WIDTH, dtype=dtype, device=device)
    return {"x": x, "bias": normal(4 * WIDTH, device=device), **options}


def _small_inputs(length: int, device: str) -> Inputs:
    return {"x": normal(length, 24, device=device), "bias": normal(24, device=device)}


def _cost(v: Values, element_size: int) -> Cost:
    """x read, the output written; back, its gradient and x read, a gradient written."""
    tensor = v["T"] * 4 * WIDTH * element_size
    return Cost(2 * tensor, 0, 3 * tensor, 0)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    launchers = kernels("bias_gelu")
    out = launchers.bias_gelu_forward(inputs["x"], inputs["bias"], launchers.EXACT)
    return lambda: launchers.bias_gelu_backward(out, inputs["x"], inputs["bias"], launchers.EXACT)


SPEC = OpSpec(
    name="bias_gelu",
    definition=reference.bias_gelu,
    kernels=("bias_gelu",),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    sizes=(Size("64x325", {"T": 64 * 325}, 2),),
    cpu_sizes=(Size("4x325", {"T": 4 * 325}, 2),),
    accuracy=tuple(
        AccuracyShape(f"20800 {kind}", {"T": 64 * 325, "approximate": kind}) for kind in ("none", "tanh", "quick")
    ),
    float32=("bias",),
)
