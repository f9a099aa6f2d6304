"""Bias, dropout, residual sum and LayerNorm, between the layers of every encoder."""

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
from sclkern.tools.specs._workload import WIDTH, captions


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    inputs: Inputs = {name: normal(v["T"], WIDTH, dtype=dtype, device=device) for name in ("x", "residual")}
    inputs |= {name: normal(WIDTH, device=device) for name in ("weight", "bias")}
    # The vision encoder returns the sum too, and adds the bias elsewhere.
    return inputs | ({"return_sum": True} if v.get("return_sum") else {"x_bias": normal(WIDTH, device=device)})


def _small_inputs(length: int, device: str) -> Inputs:
    parameters = {name: normal(24, device=device) for name in ("weight", "bias", "x_bias")}
    return {"x": normal(length, 24, device=device), "residual": normal(length, 24, device=device)} | parameters


def _cost(v: Values, element_size: int) -> Cost:
    """x and residual read, the output written; back, its gradient and the output read, two gradients written."""
    tensor = v["T"] * WIDTH * element_size
    return Cost(3 * tensor, 0, 4 * tensor, 0)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    x, residual, weight, bias, x_bias = (inputs[name] for name in ("x", "residual", "weight", "bias", "x_bias"))
    launchers = kernels("dropout_add_layer_norm")
    forward = launchers.dropout_add_layer_norm_forward
    out, total, *statistics = forward(x, residual, weight, bias, x_bias, seed, dropout_p, 1e-12)
    tensors = out, None, None, x, residual, total, weight, x_bias, seed, *statistics
    return lambda: launchers.dropout_add_layer_norm_backward(*tensors, dropout_p, x.dtype, residual.dtype)


_ROWS = {"T": 64 * 325}
SPEC = OpSpec(
    name="dropout_add_layer_norm",
    definition=reference.dropout_add_layer_norm,
    kernels=("dropout_add_layer_norm",),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    sizes=(Size("64x325", _ROWS, 1, 0.1), Size("64x13", {"T": sum(captions(64))}, 3, 0.1)),
    cpu_sizes=(Size("8x325", {"T": 8 * 325}, 1, 0.1),),
    accuracy=(
        AccuracyShape("20800", _ROWS, 0.1),
        AccuracyShape("20800 with the sum", {**_ROWS, "return_sum": True}, float32=("residual",)),
    ),
    float32=("weight", "bias", "x_bias"),
    dropout=True,
)
