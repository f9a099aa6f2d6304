"""The draw of the patches that a mask token replaces."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.tools.specs._spec import Cost, Inputs, OpSpec, Size, Values, kernels, seed_tensor
from sclkern.tools.specs._workload import PATCHES


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    options = {"num_patches": PATCHES, "ratio": 0.5, "batch": v["B"]}
    return options | {"seed": seed_tensor(device), "device": device}


def _small_inputs(length: int, device: str) -> Inputs:
    return {"num_patches": 9, "ratio": 0.5, "batch": length, "seed": seed_tensor(device), "device": device}


def _cost(v: Values, element_size: int) -> Cost:
    return Cost(v["B"] * PATCHES, 0)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> None:
    count = int(inputs["num_patches"] * inputs["ratio"])
    kernels("masking").select_tokens(inputs["seed"], inputs["num_patches"], count, inputs["batch"])


_SIZE = Size("64", {"B": 64, "K": 64, "L": 18}, 3)
SPEC = OpSpec(
    name="select_tokens",
    definition=reference.select_tokens,
    kernels=("masking",),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    sizes=(_SIZE,),
    cpu_sizes=(_SIZE,),
    differentiable=False,
)
