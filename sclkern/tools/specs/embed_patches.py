"""The patch embedding of kept patches, with positions, mask tokens and the first LayerNorm."""

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
from sclkern.tools.specs._workload import IMAGE_SIZE, PATCH_SIZE, PATCHES, WIDTH


def _inputs(v: Values, dtype: torch.dtype, device: str) -> Inputs:
    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return normal(*shape, dtype=dtype, device=device, scale=scale)

    frames, side = v.get("F", 1), v.get("side", IMAGE_SIZE)
    patches = (side // PATCH_SIZE) ** 2
    inputs: Inputs = {"images": tensor(v["B"], frames, 3, side, side)}
    inputs |= {"weight": tensor(WIDTH, 3, PATCH_SIZE, PATCH_SIZE, scale=0.04)}
    inputs |= {"position": tensor(1 + patches, WIDTH), "cls": tensor(WIDTH)}
    inputs |= {name: tensor(WIDTH) for name in ("norm_weight", "norm_bias")}
    if frames > 1:
        inputs["temporal"] = tensor(frames, WIDTH)
    if v["K"] < patches:
        inputs["keep"] = reference.select_patches(patches, v["K"] / patches, v["B"], seed=1, device=device)
    if "replaced" in v:
        inputs["replace"] = reference.select_tokens(patches, v["replaced"], v["B"], seed=1, device=device)
        inputs["mask_token"] = tensor(WIDTH)
    return inputs


def _small_inputs(length: int, device: str) -> Inputs:
    # Two frames of four patches of 4 x 4 pixels, three of them kept.
    inputs: Inputs = {
        "images": normal(length, 2, 3, 8, 8, device=device),
        "weight": normal(24, 3, 4, 4, device=device) / 7,
        "position": normal(5, 24, device=device),
        "cls": normal(24, device=device),
        "temporal": normal(2, 24, device=device),
        "keep": torch.tensor([0, 2, 3], device=device).expand(length, -1),
        "replace": (torch.arange(4, device=device) % 2 == 0).expand(length, -1),
    }
    return inputs | {name: normal(24, device=device) for name in ("mask_token", "norm_weight", "norm_bias")}


def _cost(v: Values, element_size: int) -> Cost:
    """Pixels of the kept patches, the weight, the tokens; back, the weight's gradient but none of the pixels."""
    kept, inner = v["B"] * v["K"], 3 * PATCH_SIZE**2
    pixels, weight = kept * inner * element_size, inner * WIDTH * element_size
    tokens = (kept + v["B"]) * WIDTH * element_size
    flops = 2 * kept * inner * WIDTH
    return Cost(pixels + weight + tokens, flops, pixels + weight + 2 * tokens, flops)


def _launch(inputs: Inputs, dropout_p: float, seed: Tensor | None) -> Backward:
    images, keep, weight = inputs["images"], inputs["keep"], inputs["weight"]
    launchers = kernels("embed_patches")
    launchers.unfold_patches(images, weight.shape[-1], weight.dtype, keep, None)
    tokens = weight.new_empty((len(images) * keep.shape[1], len(weight)))
    parameters = inputs["position"], inputs["cls"], None, keep, None, None, inputs["norm_weight"], inputs["norm_bias"]
    out, *statistics = launchers.add_and_normalise(tokens, parameters, len(images), 1, 1e-5, weight.dtype)
    backward = kernels("embed_patches_backward").add_and_normalise_backward
    return lambda: backward(out, tokens, parameters, *statistics, 1)


SPEC = OpSpec(
    name="embed_patches",
    definition=reference.embed_patches,
    kernels=("embed_patches", "embed_patches_backward"),
    inputs=_inputs,
    small_inputs=_small_inputs,
    cost=_cost,
    launch=_launch,
    sizes=(Size("64 of 324", {"B": 64, "K": 64}, 2), Size("324 of 324", {"B": 64, "K": PATCHES}, 3)),
    cpu_sizes=(Size("64 of 324", {"B": 4, "K": 64}, 2),),
    accuracy=(
        AccuracyShape("kept", {"B": 64, "K": 64}),
        AccuracyShape("replaced", {"B": 64, "K": PATCHES, "replaced": 0.3}),
        AccuracyShape("clips", {"B": 16, "K": 39, "F": 4, "side": 224}),
    ),
    frozen=("images",),
    float32=("weight", "position", "cls", "temporal", "mask_token", "norm_weight", "norm_bias"),
)
