"""Attention of packed sequences: images of one length, captions of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.tools.specs._spec import AccuracyShape, Backward, Inputs, OpSpec, Values, kernels, normal
from sclkern.tools.specs._workload import (
    HEAD_DIM,
    HEADS,
    LARGEST_SCORE,
    attention_sizes,
    packed_attention_cost,
    sequence_lengths,
)


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    tensors: Inputs = {}
    sides = zip(("q", "k"), sequence_lengths(v), (("query",), ("key", "value")), strict=True)
    for side, lengths, names in sides:
        for name in names:
            tensors[name] = normal(sum(lengths), v.get("H", HEADS), HEAD_DIM, dtype=dtype, device=device)
        ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        tensors |= {f"cu_seqlens_{side}": ends, f"max_seqlen_{side}": max(lengths)}
    return tensors


def _small_inputs(length: int, device: str) -> Inputs:
    tensors: Inputs = {
        name: normal(n, 1, 32, device=device) for name, n in (("query", length), ("key", 5), ("value", 5))
    }
    ends = ([0, 2, length], [0, 3, 5])
    ends_q, ends_k = (torch.tensor(side, dtype=torch.int32, device=device) for side in ends)
    return tensors | {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": length, "max_seqlen_k": 3}


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    tensors = *(inputs[name] for name in ("query", "key", "value")), None
    packing = tuple(inputs[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
    numbers = dropout_p, inputs["query"].shape[-1] ** -0.5, packing
    out, lse = kernels("attention").attention_forward(*tensors, seed, *numbers)
    return lambda: kernels("attention_backward").attention_backward(out, *tensors, seed, out, lse, *numbers)


SPEC = OpSpec(
    name="packed_attention",
    definition=reference.packed_attention,
    kernels=("attention", "attention_backward"),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=packed_attention_cost,
    launch=_launch,
    sizes=attention_sizes(64, 0.1, "325x13", "13x325", "13"),
    cpu_sizes=attention_sizes(8, 0.0, "325x13", "13"),
    accuracy=(
        AccuracyShape(
            "325x18", {"B": 64, "Lq": 325, "Lk": 18, "text": "k", "longest": 18}, 0.1, magnitude=LARGEST_SCORE
        ),
        AccuracyShape("325x325", {"B": 64, "Lq": 325, "Lk": 325, "text": ""}, 0.1, magnitude=LARGEST_SCORE),
    ),
    dropout=True,
)
