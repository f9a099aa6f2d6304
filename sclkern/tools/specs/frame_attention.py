"""Divided attention of clips of four frames."""

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
from sclkern.tools.specs._workload import HEAD_DIM, HEADS, LARGEST_SCORE, WIDTH, attention_cost


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    shape = v["B"], v["F"] * (1 + v["P"]), v.get("H", HEADS), HEAD_DIM
    tensors = {name: normal(*shape, dtype=dtype, device=device) for name in ("query", "key", "value")}
    return tensors | {"num_frames": v["F"]}


def _small_inputs(length: int, device: str) -> Inputs:
    tensors = {name: normal(1, 3 * length, 1, 32, device=device) for name in ("query", "key", "value")}
    return tensors | {"num_frames": 3}


def _cost(v: Values, element_size: int) -> Cost:
    """A frame's CLS attends to all F (1 + P) tokens, each of its P patches to the 1 + P tokens of the frame."""
    frames, patches = v["F"], v["P"]
    tokens = frames * (1 + patches)
    scores = frames * tokens + frames * patches * (1 + patches)
    return attention_cost(v["B"] * tokens, v["B"] * tokens, 4 * WIDTH * v["B"] * scores, element_size)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    tensors = tuple(inputs[name] for name in ("query", "key", "value"))
    numbers = inputs["num_frames"], inputs["query"].shape[-1] ** -0.5
    launchers = kernels("frame_attention")
    out, lse = launchers.frame_attention_forward(*tensors, *numbers)
    return lambda: launchers.frame_attention_backward(out, *tensors, out, lse, *numbers)


SPEC = OpSpec(
    name="frame_attention",
    definition=reference.frame_attention,
    kernels=("frame_attention",),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    sizes=(Size("4x197", {"B": 64, "F": 4, "P": 196}, 2),),
    cpu_sizes=(Size("4x197", {"B": 1, "F": 4, "P": 196}, 2),),
    accuracy=(AccuracyShape("4x197", {"B": 8, "F": 4, "P": 196}, magnitude=LARGEST_SCORE),),
)
