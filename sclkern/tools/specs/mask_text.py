"""The draw of a caption's masked tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.tools.specs._spec import Cost, Inputs, OpSpec, Size, Values, kernels, seed_tensor
from sclkern.tools.specs._workload import VOCABULARY, captions


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    ids = torch.randint(5, VOCABULARY - 1, (v["B"], v["L"]), device=device)
    options = {"kind": "mlm", "ratio": 0.15, "mask_id": VOCABULARY - 1, "vocab_size": VOCABULARY}
    return {
        "ids": ids,
        "lengths": torch.tensor(captions(v["B"]), device=device),
        "seed": seed_tensor(device),
        **options,
    }


def _small_inputs(length: int, device: str) -> Inputs:
    ids = torch.randint(3, 49, (2, length), device=device)
    options = {"kind": "mlm", "ratio": 0.3, "mask_id": 49, "vocab_size": 50, "seed": seed_tensor(device)}
    return {"ids": ids, "lengths": torch.tensor([length, length - 1], device=device), **options}


def _cost(v: Values, element_size: int) -> Cost:
    return Cost(v["B"] * (8 + v["L"] * (8 + 8 + 1)), 0)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> None:
    tensors = inputs["ids"], inputs["lengths"], inputs["seed"]
    kernels("masking").mask_text(*tensors, False, inputs["ratio"], inputs["mask_id"], inputs["vocab_size"], False)


_SIZE = Size("64", {"B": 64, "K": 64, "L": 18}, 3)
SPEC = OpSpec(
    name="mask_text",
    definition=reference.mask_text,
    kernels=("masking",),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    sizes=(_SIZE,),
    cpu_sizes=(_SIZE,),
    differentiable=False,
)
