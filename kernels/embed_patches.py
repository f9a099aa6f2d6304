"""Patch embedding around its matrix product: kept patches unfolded before it, all that a token gets after it.

B samples, F frames, P patches of a frame, K of them kept, D columns. A frame has slots 0 (the CLS) to K; a group is a
frame of a sample, and a row one slot of a group. Arithmetic in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whole rows in registers, 8 columns a thread. Not yet tuned on a GPU.
COLUMNS_PER_WARP = 256
LENGTHS = ["samples", "frames", "kept", "patches"]


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


@triton.jit(do_not_specialize=LENGTHS)
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
    place = patches_ptr + row * elements + element
    tl.store(place, pixels.to(patches_ptr.dtype.element_ty), mask=element < elements)


@triton.jit(do_not_specialize=LENGTHS)
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


def row_configuration(columns: int) -> dict[str, int]:
    block = max(16, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(4, block // COLUMNS_PER_WARP)}


def unfold_patches(
    images: Tensor, size: int, dtype: torch.dtype, keep: Tensor | None, replace: Tensor | None
) -> Tensor:
    """images (B, F, C, S, S), any strides: (B * F * K, C * size * size) of ``dtype``, zero where ``replace`` (B, P)."""
    samples, frames, channels, height, width = images.shape
    per_line = width // size
    patches = height // size * per_line
    kept = patches if keep is None else keep.shape[1]
    elements = channels * size * size
    out = torch.empty((samples * frames * kept, elements), dtype=dtype, device=images.device)
    if out.numel():
        strides = zip(("sample", "frame", "channel", "y", "x"), images.stride(), strict=True)
        unfold_patches_kernel[(out.shape[0],)](
            images_ptr=images,
            keep_ptr=keep,
            replace_ptr=replace,
            patches_ptr=out,
            frames=frames,
            kept=kept,
            patches=patches,
            patches_per_line=per_line,
            CHANNELS=channels,
            SIZE=size,
            enable_fp_fusion=True,
            **{f"{name}_stride": stride for name, stride in strides},
            **row_configuration(elements),
        )
    return out


def add_and_normalise(
    tokens: Tensor, parameters: dict[str, Tensor | None], samples: int, frames: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B * F * K, D); ``parameters`` by name, each contiguous or None: position, cls, temporal, keep, replace,
    mask_token, norm_weight and norm_bias.

    Returns:
        (B, F * (1 + K), D) of ``dtype``; mean and 1 / deviation of its rows (rows,) float32, empty without
        normalisation.
    """
    columns, patches = tokens.shape[1], parameters["position"].shape[0] - 1
    kept = patches if parameters["keep"] is None else parameters["keep"].shape[1]
    rows = samples * frames * (kept + 1)
    out = torch.empty((samples, frames * (kept + 1), columns), dtype=dtype, device=tokens.device)
    statistics = 0 if parameters["norm_weight"] is None else rows
    mean, rstd = (torch.empty((statistics,), dtype=torch.float32, device=tokens.device) for _ in range(2))
    if rows:
        embed_patches_forward_kernel[(rows,)](
            tokens_ptr=tokens,
            out_ptr=out,
            mean_ptr=mean,
            rstd_ptr=rstd,
            frames=frames,
            kept=kept,
            patches=patches,
            columns=columns,
            eps=eps,
            enable_fp_fusion=True,
            **{f"{name}_ptr": tensor for name, tensor in parameters.items()},
            **row_configuration(columns),
        )
    return out, mean, rstd


def ahead_of_time(kernel: triton.JITFunction, absent: set[str], tokens: str = "bf16", **constants: int) -> dict:
    """An entry of ``AHEAD_OF_TIME`` for D = 768: float32 beside tokens of that dtype, None for what is absent."""
    kinds = dict.fromkeys(("tokens_ptr", "grad_tokens_ptr", "patches_ptr"), f"*{tokens}")
    kinds |= {"keep_ptr": "*i64", "replace_ptr": "*i1", "slots_ptr": "*i32", "eps": "fp32"}
    pointers = {name for name in kernel.arg_names if name.endswith("_ptr")}
    return {
        "kernel": kernel,
        "signature": dict.fromkeys(pointers, "*fp32") | kinds,
        "constants": dict.fromkeys(sorted(pointers & absent)) | constants,
        "num_warps": 4,
        "divisible": [name for name in ("columns", "channel_stride", "y_stride") if name in kernel.arg_names],
    }


# A picture of which patches are dropped, and a whole clip of which some are replaced.
PICTURE = {"temporal_ptr", "replace_ptr", "mask_token_ptr", "temporal_sum_ptr", "mask_token_sum_ptr"}
CLIP = {"keep_ptr"}
AHEAD_OF_TIME = [
    ahead_of_time(unfold_patches_kernel, PICTURE, x_stride=1, CHANNELS=3, SIZE=16, BLOCK=1024),
    ahead_of_time(embed_patches_forward_kernel, PICTURE, BLOCK=1024),
    ahead_of_time(embed_patches_forward_kernel, CLIP, BLOCK=1024),
    ahead_of_time(embed_patches_forward_kernel, CLIP, "fp32", BLOCK=1024),
]
