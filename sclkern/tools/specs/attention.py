"""Padded attention of images, captions and both."""

from __future__ import annotations

import torch
from torch import Tensor

from sclkern import reference
from sclkern.tools.specs._spec import AccuracyShape, Backward, Cost, Inputs, OpSpec, Size, Values, kernels, normal
from sclkern.tools.specs._workload import (
    HEAD_DIM,
    HEADS,
    LARGEST_SCORE,
    attention_sizes,
    captions,
    packed_attention_cost,
)


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    heads, head_dim = v.get("H", HEADS), v.get("D", HEAD_DIM)
    lengths = {"query": v["Lq"], "key": v["Lk"], "value": v["Lk"]}
    tensors: Inputs = {
        name: normal(v["B"], length, heads, head_dim, dtype=dtype, device=device) for name, length in lengths.items()
    }
    mask = None
    if "k" in v["text"]:
        tokens = torch.tensor(captions(v["B"], v.get("longest")), device=device)
        mask = torch.arange(v["Lk"], device=device) < tokens[:, None]
    bias = normal(1, heads, v["Lq"], v["Lk"], dtype=dtype, device=device) if v.get("bias") else None
    return tensors | {"key_padding_mask": mask} | ({} if bias is None else {"bias": bias})


def _small_inputs(length: int, device: str) -> Inputs:
    lengths = {"query": length, "key": 5, "value": 5}
    tensors = {name: normal(2, rows, 1, 32, device=device) for name, rows in lengths.items()}
    return tensors | {"key_padding_mask": torch.arange(5, device=device) < torch.tensor([[5], [4]], device=device)}


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    tensors = *(inputs[name] for name in ("query", "key", "value")), inputs["key_padding_mask"]
    numbers, bias = (dropout_p, inputs["query"].shape[-1] ** -0.5), inputs.get("bias")
    out, lse = kernels("attention").attention_forward(*tensors, seed, *numbers, bias=bias)
    results = out, *tensors, seed, out, lse, *numbers

    def backward() -> None:
        kernels("attention_backward").attention_backward(*results, bias=bias)
        if bias is not None:
            kernels("attention_backward_bias").attention_backward_bias(*results, bias)

    return backward


def _cost(v: Values, element_size: int) -> Cost:
    """Of a bias its bytes too, forward, backward, and those of its gradient."""
    cost, bias = packed_attention_cost(v, element_size), v.get("bias", 0) * HEADS * v["Lq"] * v["Lk"] * element_size
    return cost._replace(forward_bytes=cost.forward_bytes + bias, backward_bytes=cost.backward_bytes + 2 * bias)


def _shape(name: str, queries: int, keys: int, text: str, **values: int) -> AccuracyShape:
    longest = {"longest": keys} if text else {}
    values = {"B": 64, "Lq": queries, "Lk": keys, **longest, **values}
    return AccuracyShape(name, {**values, "text": text}, 0.1, magnitude=LARGEST_SCORE)


_SIZES = attention_sizes(64, 0.1)
SPEC = OpSpec(
    name="attention",
    definition=reference.attention,
    kernels=("attention", "attention_dropout", "attention_backward", "attention_backward_bias"),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    # Some libraries have no dropout.
    sizes=(
        *_SIZES,
        Size("325 without dropout", _SIZES[0].values, 2),
        # The relative positions of BEiT, learned and the same for all samples.
        Size("197 with bias", {"B": 64, "Lq": 197, "Lk": 197, "text": "", "bias": 1}, 3),
    ),
    cpu_sizes=attention_sizes(2, 0.0, "325", "325x13", "65"),
    accuracy=(
        _shape("325x325", 325, 325, ""),
        _shape("325x13", 325, 13, "k"),
        _shape("325x50", 325, 50, "k"),
        _shape("13x325", 13, 325, ""),
        _shape("65x65", 65, 65, ""),
        _shape("50x50", 50, 50, "k"),
        _shape("head_dim 128", 325, 50, "k", B=16, H=6, D=128),
        _shape("bias", 197, 197, "", bias=1),
    ),
    dropout=True,
)
