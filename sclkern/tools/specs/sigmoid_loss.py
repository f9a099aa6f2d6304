"""SigLIP's loss of images against texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern import reference
from sclkern.tools.specs._spec import AccuracyShape, Backward, Cost, Inputs, OpSpec, Values, kernels, normal
from sclkern.tools.specs._workload import WIDTH, row_sizes

# Where SigLIP starts, and about where it ends: exp(log 10) and -10, 118 and -13.
SCALE, BIAS = 10.0, -10.0


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    text = F.normalize(normal(v["N"], WIDTH, device=device), dim=-1)
    image = F.normalize(text + normal(v["N"], WIDTH, device=device, scale=2.0 * WIDTH**-0.5), dim=-1)
    numbers = {
        name: torch.tensor(v.get(name, default), device=device) for name, default in (("scale", SCALE), ("bias", BIAS))
    }
    return {"image": image.to(dtype), "text": text.to(dtype), **numbers}


def _small_inputs(length: int, device: str) -> Inputs:
    features = {name: normal(length, 16, device=device, scale=0.3) for name in ("image", "text")}
    return features | {"scale": torch.tensor(2.0, device=device), "bias": torch.tensor(-1.0, device=device)}


def _cost(v: Values, element_size: int) -> Cost:
    """N x N logits forward, and two products of their gradient back."""
    tensor = v["N"] * WIDTH * element_size
    flops = 2 * v["N"] ** 2 * WIDTH
    return Cost(2 * tensor, flops, 4 * tensor, 2 * flops)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    image, text, scale, bias = (inputs[name] for name in ("image", "text", "scale", "bias"))
    launchers, rows = kernels("sigmoid_loss"), image.shape[0]
    loss, _, _ = launchers.sigmoid_loss_forward(image, text, scale, bias, 0, rows)
    sides = (image, text), (text, image)
    return lambda: [launchers.sigmoid_loss_gradient(*side, scale, bias, loss, 0, rows) for side in sides]


def _shape(name: str, **values: float) -> AccuracyShape:
    return AccuracyShape(name, values, float32=("scale", "bias"), magnitude=values.get("scale", SCALE))


SPEC = OpSpec(
    name="sigmoid_loss",
    definition=reference.sigmoid_loss,
    kernels=("sigmoid_loss",),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    sizes=row_sizes((4096, 16384, 65536), 4096),
    cpu_sizes=row_sizes((512, 1024, 4096), 1024),
    accuracy=(_shape("128", N=128), _shape("4096", N=4096, scale=118.0, bias=-13.0)),
    float32=("scale", "bias"),
)
