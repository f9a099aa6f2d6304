"""The contrastive loss of recovered against complete features."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.tools.specs._spec import AccuracyShape, Backward, Cost, Inputs, OpSpec, Size, Values, kernels, normal
from sclkern.tools.specs._workload import WIDTH, row_sizes


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    groups = (v["G"],) if "G" in v else ()
    complete = normal(*groups, v.get("M", v["N"]), WIDTH, device=device)
    # By default as close to its own complete feature as after some training.
    recovered = complete[..., : v["N"], :] + normal(*groups, v["N"], WIDTH, device=device, scale=v.get("noise", 2.0))
    temperature = torch.tensor(v["temperature"], device=device) if "temperature" in v else 0.05
    return {"recovered": recovered.to(dtype), "complete": complete.to(dtype), "temperature": temperature}


def _small_inputs(length: int, device: str) -> Inputs:
    features = {name: normal(length, 16, device=device) for name in ("recovered", "complete")}
    return features | {"temperature": torch.tensor(0.5, device=device)}


def _cost(v: Values, element_size: int) -> Cost:
    """N x M similarities forward, one product of their gradient back: the complete side is detached."""
    rows, columns = v["N"], v.get("M", v["N"])
    features, statistics = (rows + columns) * WIDTH * element_size, 2 * rows * 4
    flops = 2 * rows * columns * WIDTH
    return Cost(features + statistics, flops, features + rows * WIDTH * element_size + statistics, flops)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    x, y = inputs["recovered"][None], inputs["complete"][None]
    temperature, rows = torch.empty((), device=x.device), x.shape[1]
    forward = kernels("completion_loss").completion_loss_forward
    losses, positive, lse, _, *rnorms = forward(x, y, temperature, None, None, True, False, True, 1e-8, 0, rows)
    saved = x, y, temperature, None, None, positive, lse, tuple(rnorms), True, 1e-8
    launch = kernels("completion_loss_backward").completion_loss_backward
    # Complete features are detached.
    return lambda: launch(losses, *saved, ([(0, rows)], []))


def _shape(name: str, **values: int) -> AccuracyShape:
    """Positives at a cosine of about 0.9, as those of a trained model; logits up to 1 / temperature."""
    trained = {"noise": 0.5, "temperature": 0.03}
    return AccuracyShape(name, {**values, **trained}, float32=("temperature",), magnitude=34.0)


SPEC = OpSpec(
    name="completion_loss",
    definition=reference.completion_loss,
    kernels=("completion_loss", "completion_loss_backward"),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    # The last with a hard negative for each row.
    sizes=(*row_sizes((4096, 16384, 65536), 4096), Size("4096 of 8192", {"N": 4096, "M": 8192}, 3)),
    cpu_sizes=(*row_sizes((512, 1024, 4096), 1024), Size("2048 of 4096", {"N": 2048, "M": 4096}, 3)),
    accuracy=(_shape("128", N=128), _shape("4096", N=4096), _shape("of 4 frames", G=4, N=64)),
    detached=("complete",),
    float32=("temperature",),
)
