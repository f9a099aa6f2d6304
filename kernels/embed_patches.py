"""Patch embedding around its matrix product: kept patches unfolded before it, all that a token gets after it.

B samples, F frames, P patches of a frame, K of them kept, D columns. A frame has slots 0 (the CLS) to K; a group is a
frame of a sample, and a row one slot of a group. Arithmetic in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import Features, LaunchConfig, resolve, select, settled
from sclkern.kernels.launch import Prepared, static_entry

# Integers that differ from batch to batch: one compiled kernel serves them all.
DYNAMIC_ARGS = ["samples", "frames", "kept", "patches"]


@triton.jit
def patch_of(keep_ptr, replace_ptr, sample, slot, kept, patches):
    """The patch in a slot, -1 for the CLS, and 1 where the mask token replaces it, else 0."""
    patch = slot - 1
    if keep_ptr is not None:
        patch = tl.load(keep_ptr + sample * kept + slot - 1, mask=slot > 0, other=-1)
    replaced = (slot < 0).to(tl.int32)
    if replace_ptr is not None:
        replaced = tl.load(replace_ptr + sample * patches + patch, mask=slot > 0, other=0).to(tl.int32)
    return patch, replaced


# Whole rows are masked by a number of columns of zero: the interpreter takes no mask of one element beside a row.
@triton.jit
def embedded(
    tokens_ptr, position_ptr, cls_ptr, temporal_ptr, keep_ptr, replace_ptr, mask_token_ptr,
    group, slot, frames, kept, patches, columns, column,
):  # fmt: skip
    """A row before the normalisation, float32, and 1 where the mask token is in it, else 0."""
    inside = column < columns
    patch, replaced = patch_of(keep_ptr, replace_ptr, group // frames, slot, kept, patches)
    is_patch = (slot > 0).to(tl.int32)
    # One of the three is loaded, and the others are zero.
    token = tokens_ptr + (group * kept + slot - 1) * columns + column
    total = tl.load(token, mask=column < columns * (is_patch - replaced), other=0.0).to(tl.float32)
    total += tl.load(cls_ptr + column, mask=column < columns * (1 - is_patch), other=0.0).to(tl.float32)
    if replace_ptr is not None:
        total += tl.load(mask_token_ptr + column, mask=column < columns * replaced, other=0.0).to(tl.float32)
    total += tl.load(position_ptr + (patch + 1) * columns + column, mask=inside, other=0.0).to(tl.float32)
    if temporal_ptr is not None:
        total += tl.load(temporal_ptr + group % frames * columns + column, mask=inside, other=0.0).to(tl.float32)
    return total, replaced


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
def unfold_patches_kernel(
    images_ptr,  # (B, F, CHANNELS, S, S)
    keep_ptr,  # (B, K) int64, or None
    replace_ptr,  # (B, P) bool, or None
    patches_ptr,  # (B * F * K, CHANNELS * SIZE * SIZE)
    frames,
    kept,
    patches,
    patches_per_line,
    sample_stride,
    frame_stride,
    channel_stride,
    y_stride,
    x_stride,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample, frame = row // kept // frames, row // kept % frames
    patch, replaced = patch_of(keep_ptr, replace_ptr, sample, row % kept + 1, kept, patches)
    element = tl.arange(0, BLOCK)
    elements: tl.constexpr = CHANNELS * SIZE * SIZE
    channel = (element // (SIZE * SIZE)).to(tl.int64)
    y = patch // patches_per_line * SIZE + element // SIZE % SIZE
    x = patch % patches_per_line * SIZE + element % SIZE
    offset = sample * sample_stride + frame * frame_stride + channel * channel_stride + y * y_stride + x * x_stride
    pixels = tl.load(images_ptr + offset, mask=element < elements * (1 - replaced), other=0.0).to(tl.float32)
    destination = patches_ptr + row * elements + element
    tl.store(destination, pixels.to(patches_ptr.dtype.element_ty), mask=element < elements)


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
def embed_patches_forward_kernel(
    tokens_ptr,  # (B * F * K, D)
    position_ptr,  # (1 + P, D)
    cls_ptr,  # (D,)
    temporal_ptr,  # (frames at most, D), or None
    keep_ptr,  # (B, K) int64, or None
    replace_ptr,  # (B, P) bool, or None
    mask_token_ptr,  # (D,), or None
    norm_weight_ptr,  # (D,), or None without normalisation
    norm_bias_ptr,  # (D,), or None
    out_ptr,  # (B * F * (1 + K), D)
    mean_ptr,  # (B * F * (1 + K),) float32, or None
    rstd_ptr,  # (B * F * (1 + K),) float32, or None
    frames,
    kept,
    patches,
    columns,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    out, _ = embedded(
        tokens_ptr, position_ptr, cls_ptr, temporal_ptr, keep_ptr, replace_ptr, mask_token_ptr,
        row // (kept + 1), row % (kept + 1), frames, kept, patches, columns, column,
    )  # fmt: skip
    if norm_weight_ptr is not None:
        mean = tl.sum(out, axis=0) / columns
        centred = tl.where(inside, out - mean, 0.0)
        # What rounding the mean left, which a large mean would show in every output, is taken off.
        left = tl.sum(centred, axis=0) / columns
        variance = tl.sum(centred * centred, axis=0) / columns - left * left
        rstd = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
        weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        out = (centred - left) * rstd * weight + bias
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    tl.store(out_ptr + row * columns + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def unfold_patches(
    images: Tensor,
    size: int,
    dtype: torch.dtype,
    keep: Tensor | None,
    replace: Tensor | None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """images (B, F, C, S, S), any strides: (B * F * K, C * size * size) of ``dtype``, zero where ``replace`` (B, P)."""
    launch, shape = _prepare_unfold(
        config, dtype, images.device, images.shape, images.stride(), size, None if keep is None else keep.shape[1]
    )
    out = images.new_empty(shape, dtype=dtype)
    launch(images, keep, replace, out)
    return out


@settled
def _prepare_unfold(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, images: torch.Size,
    strides: tuple[int, ...], size: int, kept: int | None,
) -> tuple[Prepared, tuple[int, int]]:  # fmt: skip
    samples, frames, channels, height, width = images
    per_line = width // size
    patches = height // size * per_line
    kept = patches if kept is None else kept
    elements = channels * size * size
    (chosen,) = resolve(config, ("unfold_patches_kernel",), Features(dtype, device), columns=elements)
    numbers = {"frames": frames, "kept": kept, "patches": patches, "patches_per_line": per_line}
    named = zip(("sample", "frame", "channel", "y", "x"), strides, strict=True)
    numbers |= {"CHANNELS": channels, "SIZE": size} | {f"{name}_stride": stride for name, stride in named}
    rows = samples * frames * kept
    return Prepared(unfold_patches_kernel, (rows,), chosen, **numbers), (rows, elements)


def add_and_normalise(
    tokens: Tensor,
    parameters: Sequence[Tensor | None],
    samples: int,
    frames: int,
    eps: float,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch what a token gets after the matrix product.

    Args:
        tokens: (B * F * K, D).
        parameters: position, cls, temporal, keep, replace, mask_token, norm_weight and norm_bias, each contiguous or
            None where it may be absent.
        samples: B.
        frames: F.
        eps: added to the variance.
        dtype: of the output.
        config: launch configuration, None for the selected one.

    Returns:
        (B, F * (1 + K), D) of ``dtype``; mean and 1 / deviation of its rows (rows,) float32, empty without
        normalisation.
    """
    position, _, _, keep, _, _, norm_weight, _ = parameters
    assert position is not None
    shapes = samples, frames, position.shape, None if keep is None else keep.shape[1]
    launch, shape = _prepare_forward(config, tokens.dtype, tokens.device, *shapes, eps)
    out = tokens.new_empty(shape, dtype=dtype)
    statistics = 0 if norm_weight is None else launch.grid[0]
    mean, rstd = (tokens.new_empty((statistics,), dtype=torch.float32) for _ in range(2))
    launch(tokens, *parameters, out, mean, rstd)
    return out, mean, rstd


@settled
def _prepare_forward(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, samples: int, frames: int,
    position: torch.Size, kept: int | None, eps: float,
) -> tuple[Prepared, tuple[int, int, int]]:  # fmt: skip
    patches, columns = position[0] - 1, position[1]
    kept = patches if kept is None else kept
    (chosen,) = resolve(config, ("embed_patches_forward_kernel",), Features(dtype, device), columns=columns)
    numbers = {"frames": frames, "kept": kept, "patches": patches, "columns": columns, "eps": eps}
    launch = Prepared(embed_patches_forward_kernel, (samples * frames * (kept + 1),), chosen, **numbers)
    return launch, (samples, frames * (kept + 1), columns)


def entry(kernel: Any, config: LaunchConfig, absent: set[str], tokens: str, **constants: Any) -> dict[str, Any]:
    """What the static checks compile: float32 beside tokens of that dtype, None for what is absent."""
    kinds = dict.fromkeys(("tokens_ptr", "grad_tokens_ptr", "patches_ptr"), f"*{tokens}")
    kinds |= {"keep_ptr": "*i64", "replace_ptr": "*i1", "slots_ptr": "*i32", "eps": "fp32"}
    pointers = {name for name in kernel.arg_names if name.endswith("_ptr")}
    constants = dict.fromkeys(sorted(pointers & absent)) | constants
    divisible = ("columns", "channel_stride", "y_stride")
    return static_entry(kernel, config, dict.fromkeys(pointers, "*fp32") | kinds, divisible=divisible, **constants)


# What is absent for an image of which patches are dropped, and for a whole clip of which some are replaced.
IMAGE = {"temporal_ptr", "replace_ptr", "mask_token_ptr", "temporal_sum_ptr", "mask_token_sum_ptr"}
CLIP = {"keep_ptr"}


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile: rows of 768."""
    unfold, half = select("embed_patches", "forward", torch.bfloat16, arch, columns=768)
    _, single = select("embed_patches", "forward", torch.float32, arch, columns=768)
    return [
        entry(unfold_patches_kernel, unfold, IMAGE, "bf16", x_stride=1, CHANNELS=3, SIZE=16),
        entry(embed_patches_forward_kernel, half, IMAGE, "bf16"),
        entry(embed_patches_forward_kernel, half, CLIP, "bf16"),
        entry(embed_patches_forward_kernel, single, CLIP, "fp32"),
    ]
