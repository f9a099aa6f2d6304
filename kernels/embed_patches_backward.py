"""Backward of patch embedding around its matrix product; dimensions are those of ``sclkern.kernels.embed_patches``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import Configs, Features, LaunchConfig, of_kernel, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.embed_patches import CLIP, DYNAMIC_ARGS, IMAGE, embedded, entry, patch_of
from sclkern.kernels.launch import Prepared


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
def embed_patches_backward_kernel(
    grad_out_ptr,  # (B * F * (1 + K), D)
    tokens_ptr,  # (B * F * K, D); read, as what makes up a row with them, with normalisation only
    position_ptr,
    cls_ptr,
    temporal_ptr,
    keep_ptr,
    replace_ptr,
    mask_token_ptr,
    norm_weight_ptr,  # (D,), or None without normalisation
    mean_ptr,
    rstd_ptr,
    grad_tokens_ptr,  # (B * F * K, D), zero where the mask token is
    grad_total_ptr,  # (B * F * (1 + K), D): of the rows before normalisation, or None without
    # Sums over the slots of a program, (programs, D) float32 or None:
    norm_weight_sum_ptr,
    norm_bias_sum_ptr,
    temporal_sum_ptr,
    mask_token_sum_ptr,
    frames,
    kept,
    patches,
    columns,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs_per_group = tl.cdiv(kept + 1, SLOTS)
    group = program // programs_per_group
    first = program % programs_per_group * SLOTS
    column = tl.arange(0, BLOCK)
    inside = column < columns
    if norm_weight_ptr is not None:
        weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    norm_weight_sum = tl.zeros((BLOCK,), tl.float32)
    norm_bias_sum = tl.zeros((BLOCK,), tl.float32)
    temporal_sum = tl.zeros((BLOCK,), tl.float32)
    mask_token_sum = tl.zeros((BLOCK,), tl.float32)
    for index in range(0, tl.minimum(SLOTS, kept + 1 - first)):
        slot = first + index
        row = group * (kept + 1) + slot
        grad = tl.load(grad_out_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        if norm_weight_ptr is not None:
            total, replaced = embedded(
                tokens_ptr, position_ptr, cls_ptr, temporal_ptr, keep_ptr, replace_ptr, mask_token_ptr,
                group, slot, frames, kept, patches, columns, column,
            )  # fmt: skip
            rstd = tl.load(rstd_ptr + row)
            normal = tl.where(inside, (total - tl.load(mean_ptr + row)) * rstd, 0.0)
            grad_normal = grad * weight
            # As in the forward; sums that wait for none of the others.
            left = tl.sum(normal, axis=0) / columns
            common = tl.sum(grad_normal, axis=0) / columns
            along = tl.sum(grad_normal * normal, axis=0) / columns - left * common
            normal -= left
            norm_weight_sum += grad * normal
            norm_bias_sum += grad
            grad = tl.where(inside, (grad_normal - common - normal * along) * rstd, 0.0)
            tl.store(grad_total_ptr + row * columns + column, grad.to(grad_total_ptr.dtype.element_ty), mask=inside)
        else:
            _, replaced = patch_of(keep_ptr, replace_ptr, group // frames, slot, kept, patches)
        is_mask_token = column < columns * replaced
        grad_tokens = tl.where(is_mask_token, 0.0, grad).to(grad_tokens_ptr.dtype.element_ty)
        destination = grad_tokens_ptr + (group * kept + slot - 1) * columns + column
        tl.store(destination, grad_tokens, mask=column < columns * (slot > 0).to(tl.int32))
        temporal_sum += grad
        mask_token_sum += tl.where(is_mask_token, grad, 0.0)
    destination = program * columns + column
    if norm_weight_ptr is not None:
        tl.store(norm_weight_sum_ptr + destination, norm_weight_sum, mask=inside)
        tl.store(norm_bias_sum_ptr + destination, norm_bias_sum, mask=inside)
    if temporal_sum_ptr is not None:
        tl.store(temporal_sum_ptr + destination, temporal_sum, mask=inside)
    if mask_token_sum_ptr is not None:
        tl.store(mask_token_sum_ptr + destination, mask_token_sum, mask=inside)


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
def invert_keep_kernel(
    keep_ptr,  # (B, K) int64
    slots_ptr,  # (B, 1 + P) int32: the slot of a position in its frames, -1 where it is in none
    kept,
    patches,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.where(position == 0, 0, -1)
    for start in range(0, kept, BLOCK):
        index = start + tl.arange(0, BLOCK)
        patch = tl.load(keep_ptr + sample * kept + index, mask=index < kept, other=-2)
        matching = tl.where(position[:, None] == patch[None, :] + 1, index[None, :] + 1, -1)
        slots = tl.maximum(slots, tl.max(matching, axis=1))
    tl.store(slots_ptr + sample * (patches + 1) + position, slots, mask=position <= patches)


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
def position_gradient_kernel(
    grad_total_ptr,  # (B * F * (1 + K), D)
    slots_ptr,  # (B, 1 + P) int32, or None where all patches are kept
    grad_position_ptr,  # (1 + P, D) float32
    samples,
    frames,
    kept,
    patches,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, samples * frames, BLOCK_ROWS):
        group = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        exists = group < samples * frames
        slot = group * 0 + position
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + group // frames * (patches + 1) + position, mask=exists, other=-1)
            exists = exists & (slot >= 0)
        offset = (group * (kept + 1) + slot)[:, None] * columns + column[None, :]
        inside = exists[:, None] & (column < columns)[None, :]
        total += tl.load(grad_total_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    destination = grad_position_ptr + position * columns + column
    tl.store(destination, tl.sum(total, axis=0), mask=column < columns)


def add_and_normalise_backward(
    grad_out: Tensor,
    tokens: Tensor,
    parameters: Sequence[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    frames: int,
    config: Configs = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Launch the backward of ``add_and_normalise``.

    Args:
        grad_out: (B, F * (1 + K), D) contiguous.
        tokens: (B * F * K, D), read with normalisation only.
        parameters: as of the forward.
        mean: what the forward returned.
        rstd: what the forward returned.
        frames: F.
        config: launch configurations, None for the selected ones.

    Returns:
        Gradients: of the tokens (B * F * K, D) in their dtype; of the position (1 + P, D), whose row 0 is that of the
        CLS as well; of temporal (F, D) or None; and as rows (.., D) of one tensor those of mask_token, norm_weight and
        norm_bias, as far as there are such parameters. All but the first are float32, each summed in an order that
        depends on the shapes alone.
    """
    position, _, temporal, keep, _, mask_token, norm_weight, norm_bias = parameters
    assert position is not None
    samples, columns = grad_out.shape[0], grad_out.shape[2]
    given = config if config is None or isinstance(config, LaunchConfig) else tuple(config)
    shapes = samples, frames, position.shape, None if keep is None else keep.shape[1]
    launch, invert, gradient, groups = _prepare(given, tokens.dtype, tokens.device, *shapes)
    summed = [tensor is not None for tensor in (mask_token, norm_weight, norm_bias, temporal)]
    partial = tokens.new_empty((sum(summed), launch.grid[0], columns), dtype=torch.float32)
    parts = iter(partial.unbind())
    of_mask_token, of_weight, of_bias, of_temporal = [next(parts) if given else None for given in summed]
    grad_tokens = tokens.new_empty((grad_out.shape[0] * (grad_out.shape[1] - frames), columns))
    # Of the dtype that autograd would hold it in; without normalisation it is grad_out.
    grad_total = grad_out if norm_weight is None else torch.empty_like(grad_out)
    grad_position = tokens.new_empty(position.shape, dtype=torch.float32)
    outputs = grad_tokens, None if norm_weight is None else grad_total, of_weight, of_bias, of_temporal, of_mask_token
    launch(grad_out, tokens, *parameters[:-1], mean, rstd, *outputs)
    slots = None
    if keep is not None:
        slots = keep.new_empty((samples, position.shape[0]), dtype=torch.int32)
        invert(keep, slots)
    gradient(grad_total, slots, grad_position)
    if of_temporal is None:
        return grad_tokens, grad_position, None, partial.sum(1)
    of_frames = of_temporal.view(samples, frames, groups, columns).sum((0, 2))
    return grad_tokens, grad_position, of_frames, partial[:-1].sum(1)


@settled
def _prepare(
    config: Configs, dtype: torch.dtype, device: torch.device, samples: int, frames: int, position: torch.Size,
    kept: int | None,
) -> tuple[Prepared, Prepared, Prepared, int]:  # fmt: skip
    """The three launches, and how many programs share the slots of a frame."""
    patches, columns = position[0] - 1, position[1]
    kept = patches if kept is None else kept
    names = ("embed_patches_backward_kernel", "invert_keep_kernel", "position_gradient_kernel")
    configs = resolve(config, names, Features(dtype, device), columns=columns)
    row, invert, gradient = (of_kernel(configs, name) for name in names)
    counts = {"kept": kept, "patches": patches}
    of_rows = {**counts, "frames": frames, "columns": columns}
    groups = ceil_div(kept + 1, row["SLOTS"])
    grid = patches + 1, ceil_div(columns, gradient["BLOCK_COLUMNS"])
    return (
        Prepared(embed_patches_backward_kernel, (samples * frames * groups,), row, **of_rows),
        Prepared(invert_keep_kernel, (samples, ceil_div(patches + 1, invert["BLOCK"])), invert, **counts),
        Prepared(position_gradient_kernel, grid, gradient, samples=samples, **of_rows),
        groups,
    )


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile: rows of 768."""
    half, invert, gradient = select("embed_patches", "backward", torch.bfloat16, arch, columns=768)
    single, *_ = select("embed_patches", "backward", torch.float32, arch, columns=768)
    return [
        entry(embed_patches_backward_kernel, half, IMAGE, "bf16"),
        entry(embed_patches_backward_kernel, half, CLIP, "bf16"),
        entry(embed_patches_backward_kernel, single, CLIP, "fp32"),
        entry(invert_keep_kernel, invert, set(), "bf16"),
        entry(position_gradient_kernel, gradient, set(), "bf16"),
    ]
