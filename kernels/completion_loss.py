"""Completion loss in tiles, forward: norms, similarities, both log-sum-exps and losses; N x M is never stored.

G groups of N rows and M >= N columns of D features, contiguous. The anchors are a window of the rows, all N where one
process has them all, and of the columns that belong to them; row i of the window is row offset + i, and so is its
positive. Statistics in float32. Every sum has a fixed order, so that reruns are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.completion_loss_tiles import (
    EXCLUDED,
    bytes_of,
    columns_valid,
    dots,
    entry,
    negatives,
    rows_taking_part,
)
from sclkern.kernels.config import Configs, Features, LaunchConfig, of_kernel, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.launch import Prepared


@triton.jit
def softplus(x):
    """log(1 + exp(x)), relatively exact for very negative x, where 1 + exp(x) rounds to 1."""
    small = tl.exp(-tl.abs(x))
    # log(1 + e) = 2 artanh(z) with z = e / (2 + e) <= 1/3; the series up to z^15 is exact to float32.
    z = small / (2.0 + small)
    w = z * z
    series = 1.0 / 13 + w * (1.0 / 15)
    series = 1.0 / 9 + w * (1.0 / 11 + w * series)
    series = 1.0 / 5 + w * (1.0 / 7 + w * series)
    series = 1.0 + w * (1.0 / 3 + w * series)
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit(do_not_specialize=["count", "rows", "first", "length"])
def completion_loss_norm_kernel(
    recovered_ptr,  # (G rows, D), or None for columns that belong to no row
    complete_ptr,  # (G length, D): columns first to first + rows of each group
    valid_ptr,  # (G rows,) uint8 or None
    temperature_ptr,  # (1,) float32
    recovered_rnorm_ptr,  # (G rows,) float32: 1 / max(norm, eps), or 1; 0 for rows that take no part
    complete_rnorm_ptr,  # (G length,) float32
    positive_ptr,  # (G rows,) float32: similarity of a row with its positive
    count,
    rows,
    first,
    length,
    eps,
    NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < count
    takes_part = rows_taking_part(valid_ptr, row, inside)
    column = (row // rows) * length + first + row % rows
    recovered_square = tl.zeros((BLOCK_ROWS,), tl.float32)
    complete_square = tl.zeros((BLOCK_ROWS,), tl.float32)
    product = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        d = start + tl.arange(0, BLOCK_WIDTH)
        mask = takes_part[:, None] & (d < WIDTH)[None, :]
        complete = tl.load(complete_ptr + column[:, None] * WIDTH + d[None, :], mask=mask, other=0.0).to(tl.float32)
        complete_square += tl.sum(complete * complete, axis=1)
        if recovered_ptr is not None:
            recovered = tl.load(recovered_ptr + row[:, None] * WIDTH + d[None, :], mask=mask, other=0.0).to(tl.float32)
            recovered_square += tl.sum(recovered * recovered, axis=1)
            product += tl.sum(recovered * complete, axis=1)
    if NORMALIZE:
        recovered_rnorm = 1.0 / tl.maximum(tl.sqrt(recovered_square), eps)
        complete_rnorm = 1.0 / tl.maximum(tl.sqrt(complete_square), eps)
    else:
        recovered_rnorm = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
        complete_rnorm = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    complete_rnorm = tl.where(takes_part, complete_rnorm, 0.0)
    tl.store(complete_rnorm_ptr + column, complete_rnorm, mask=inside)
    if recovered_ptr is not None:
        recovered_rnorm = tl.where(takes_part, recovered_rnorm, 0.0)
        positive = product * recovered_rnorm * complete_rnorm / tl.load(temperature_ptr)
        tl.store(recovered_rnorm_ptr + row, recovered_rnorm, mask=inside)
        tl.store(positive_ptr + row, positive, mask=inside)


_STATISTICS_NUMBERS = ["groups", "x_length", "y_length", "offset", "rows", "first_block", "blocks", "split_columns"]


@triton.jit(do_not_specialize=_STATISTICS_NUMBERS)
def completion_loss_statistics_kernel(
    x_ptr,  # (G X, D), of which the window are the anchors
    y_ptr,  # (G Y, D)
    x_valid_ptr,  # (G X,) uint8 or None
    y_valid_ptr,  # (G Y,) uint8 or None
    same_ptr,  # (M,) int64 or None: pairs of one id, other than positives, are left out
    temperature_ptr,  # (1,) float32
    x_rnorm_ptr,  # (G X,) float32
    y_rnorm_ptr,  # (G Y,) float32
    maximum_ptr,  # (splits, G rows) float32, over the columns of a split
    total_ptr,  # (splits, G rows) float32: sum of exp(s - maximum)
    spread_ptr,  # (splits, G rows) float32 or None: sum of exp(s - maximum) s
    column_maximum_ptr,  # (1 + blocks, G X) float32 or None: the same of the first X columns, over rows of a block
    column_total_ptr,
    column_spread_ptr,
    groups,
    x_length,
    y_length,
    offset,
    rows,
    first_block,
    blocks,
    split_columns,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    x_base, y_base = group * x_length, group * y_length
    x_start = (first_block + block) * BLOCK_X
    x = x_start + tl.arange(0, BLOCK_X)
    x_row = x_base + offset + x
    x_in = rows_taking_part(x_valid_ptr, x_row, x < rows)
    x_ptr += (x_base + offset + x_start) * WIDTH
    y_ptr += y_base * WIDTH
    x_scale = tl.load(x_rnorm_ptr + x_row, mask=x_in, other=0.0) / tl.load(temperature_ptr)
    maximum = tl.full((BLOCK_X,), EXCLUDED, tl.float32)
    total = tl.zeros((BLOCK_X,), tl.float32)
    spread = tl.zeros((BLOCK_X,), tl.float32)
    first = tl.program_id(1) * split_columns
    last = tl.minimum(first + split_columns, y_length)
    # Slot 0 is what the blocks of earlier launches have left.
    column_out = (block + 1).to(tl.int64) * groups * x_length + x_base
    for start in range(first, last, BLOCK_Y):
        y = start + tl.arange(0, BLOCK_Y)
        y_row = y_base + y
        y_tile_ptr = y_ptr + tl.cast(start, tl.int64) * WIDTH
        y_in = rows_taking_part(y_valid_ptr, y_row, y < y_length)
        y_scale = tl.load(y_rnorm_ptr + y_row, mask=y_in, other=0.0)
        similarity = dots(x_ptr, y_tile_ptr, x_in, y_in, WIDTH, BLOCK_X, BLOCK_Y, BLOCK_K)
        similarity = similarity * x_scale[:, None] * y_scale[None, :]
        counts = (x_scale > 0)[:, None] & (y_scale > 0)[None, :] & ((offset + x)[:, None] != y[None, :])
        counts = negatives(same_ptr, offset + x, y, x < rows, y < y_length, counts)
        similarity = tl.where(counts, similarity, EXCLUDED)
        raised = tl.maximum(maximum, tl.max(similarity, axis=1))
        shrink = tl.exp(maximum - raised)
        weight = tl.exp(similarity - raised[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        if spread_ptr is not None:
            spread = spread * shrink + tl.sum(weight * similarity, axis=1)
        maximum = raised
        if column_maximum_ptr is not None:
            top = tl.max(similarity, axis=0)
            weight = tl.exp(similarity - top[None, :])
            tl.store(column_maximum_ptr + column_out + y, top, mask=y < x_length)
            tl.store(column_total_ptr + column_out + y, tl.sum(weight, axis=0), mask=y < x_length)
            if column_spread_ptr is not None:
                tl.store(column_spread_ptr + column_out + y, tl.sum(weight * similarity, axis=0), mask=y < x_length)
    out = (tl.program_id(1).to(tl.int64) * groups + group) * rows + x
    tl.store(maximum_ptr + out, maximum, mask=x < rows)
    tl.store(total_ptr + out, total, mask=x < rows)
    if spread_ptr is not None:
        tl.store(spread_ptr + out, spread, mask=x < rows)


@triton.jit(do_not_specialize=["count", "length", "offset", "rows", "splits"])
def completion_loss_merge_kernel(
    maximum_ptr,  # (splits, G rows) float32
    total_ptr,  # (splits, G rows) float32
    spread_ptr,  # (splits, G rows) float32 or None
    positive_ptr,  # (G N,) float32
    previous_ptr,  # (G rows,) float32 or None: loss of the other direction
    lse_ptr,  # (G rows,) float32: log-sum-exp over the other pairs; None leaves the merged sums in the first split
    mean_spread_ptr,  # (G rows,) float32 or None: mean of s - positive under the softmax over the other pairs
    losses_ptr,  # (G rows,) float32
    count,
    length,
    offset,
    rows,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < count
    maximum = tl.full((BLOCK_ROWS,), EXCLUDED, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    spread = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        at = split.to(tl.int64)[:, None] * count + row[None, :]
        mask = (split < splits)[:, None] & inside[None, :]
        part = tl.load(maximum_ptr + at, mask=mask, other=EXCLUDED)
        raised = tl.maximum(maximum, tl.max(part, axis=0))
        shrink, part_shrink = tl.exp(maximum - raised), tl.exp(part - raised[None, :])
        total = total * shrink + tl.sum(tl.load(total_ptr + at, mask=mask, other=0.0) * part_shrink, axis=0)
        if spread_ptr is not None:
            spread = spread * shrink + tl.sum(tl.load(spread_ptr + at, mask=mask, other=0.0) * part_shrink, axis=0)
        maximum = raised
    if lse_ptr is None:
        tl.store(maximum_ptr + row, maximum, mask=inside)
        tl.store(total_ptr + row, total, mask=inside)
        if spread_ptr is not None:
            tl.store(spread_ptr + row, spread, mask=inside)
    else:
        anchor_row = (row // rows) * length + offset + row % rows
        positive = tl.load(positive_ptr + anchor_row, mask=inside, other=0.0)
        total = tl.where(inside, total, 1.0)
        lse = maximum + tl.log(total)
        loss = softplus(lse - positive)
        if previous_ptr is not None:
            loss += tl.load(previous_ptr + row, mask=inside, other=0.0)
        tl.store(lse_ptr + row, lse, mask=inside)
        tl.store(losses_ptr + row, loss, mask=inside)
        if spread_ptr is not None:
            tl.store(mean_spread_ptr + row, spread / total - positive, mask=inside)


def completion_loss_forward(
    recovered: Tensor,
    complete: Tensor,
    temperature: Tensor,
    valid: Tensor | None,
    same: Tensor | None,
    both: bool,
    spread: bool,
    normalize: bool,
    eps: float,
    offset: int,
    rows: int,
    config: Configs = None,
) -> tuple[Tensor, ...]:
    """recovered (G, N, D) and complete (G, M, D) contiguous; temperature () float32; valid (G, N) bool and same (M,)
    int64, contiguous: pairs of one id are no negatives.

    Returns float32 losses (G, rows), positive (G, N), lse (directions, G, rows), mean spread (directions or 0, G,
    rows) and rnorm of recovered (G, N) and of complete (G, M).
    """
    groups, length, _ = recovered.shape
    columns_of_group = complete.shape[1]
    shape = groups, rows
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    losses, positive = recovered.new_empty(shape, **kwargs), recovered.new_empty((groups, length), **kwargs)
    lse = recovered.new_empty((2 if both else 1, *shape), **kwargs)
    norms = recovered.new_empty((groups, length), **kwargs), recovered.new_empty((groups, columns_of_group), **kwargs)
    mean_spread = recovered.new_empty((len(lse) if spread else 0, *shape), **kwargs)
    if not losses.numel():
        return losses, positive, lse, mean_spread, *norms
    masks = bytes_of(valid), bytes_of(columns_valid(valid, columns_of_group))
    given = config if config is None or isinstance(config, LaunchConfig) else tuple(config)
    sizes = recovered.shape, columns_of_group, both, spread, normalize, eps, offset, rows
    plan = _prepare(given, recovered.dtype, recovered.device, *sizes)
    # Once: a view takes as long as a launch.
    lse_of = lse.unbind()
    spread_of: Sequence[Any] = mean_spread.unbind() if spread else (None, None)
    absent = () if spread else (None,)
    partial: Sequence[Any] = (*recovered.new_empty(plan.partial, **kwargs).unbind(), *absent)
    columns: Sequence[Any] = (None, None, None)
    merged = columns
    if plan.columns is not None:
        sums = recovered.new_empty(plan.columns, **kwargs)
        columns = (*sums.unbind(), *absent)
        merged = columns
        if plan.strips == 1:
            # Slot 0 is for what earlier launches have left, of which there are none.
            merged = (*sums[:, 1:].unbind(), *absent)
        else:
            columns[0][0].fill_(EXCLUDED.value)
            sums[1:, 0].zero_()
    plan.norm(recovered, complete, masks[0], temperature, *norms, positive)
    if plan.further_norm is not None:
        plan.further_norm(None, complete, None, temperature, None, norms[1], None)
    sides: Sequence[Any] = ((recovered, complete), masks, norms)
    for launch, direction, merges in plan.launches:
        features, taken, rnorms = (side[:: 1 - 2 * direction] for side in sides)
        launch(*features, *taken, same, temperature, *rnorms, *partial, *columns)
        for merge, of_columns, side, last in merges:
            previous, of_side = losses if side else None, lse_of[side] if last else None
            merge(*(merged if of_columns else partial), positive, previous, of_side, spread_of[side], losses)
    return losses, positive, lse, mean_spread, *norms


class _Plan(NamedTuple):
    """What the forward launches: the norms, and those of columns that belong to no row; the statistics, each with its
    direction and its merges, which are of the columns or not, of a direction, and the last of it or not; shapes of the
    partial sums; the strips of rows."""

    norm: Prepared
    further_norm: Prepared | None
    launches: list[tuple[Prepared, int, list[tuple[Prepared, bool, int, bool]]]]
    partial: tuple[int, ...]
    columns: tuple[int, ...] | None
    strips: int


@settled
def _prepare(
    config: Configs, dtype: torch.dtype, device: torch.device, shape: torch.Size, columns_of_group: int, both: bool,
    spread: bool, normalize: bool, eps: float, offset: int, rows: int,
) -> _Plan:  # fmt: skip
    groups, length, width = shape
    names = ("completion_loss_norm_kernel", "completion_loss_statistics_kernel", "completion_loss_merge_kernel")
    configs = resolve(config, names, Features(dtype, device))
    norm, statistics, merging = (of_kernel(configs, name) for name in names)
    count, kinds = groups * rows, 3 if spread else 2

    def merge(splits: int) -> Prepared:
        grid = (ceil_div(count, merging["BLOCK_ROWS"]),)
        sizes = {"count": count, "length": length, "offset": offset, "rows": rows, "splits": splits}
        return Prepared(completion_loss_merge_kernel, grid, merging, **sizes)

    # Where the window is everything, the tiles of one direction are those of the other.
    shared = both and rows == length
    blocks = ceil_div(rows, statistics["BLOCK_X"])
    strip = min(blocks, max(1, statistics["COLUMN_SUMS"] // (groups * length))) if shared else blocks
    # Columns are split until there are so many programs; a constant of the table, so that sums have a fixed order.
    splits_wanted = ceil_div(statistics["PROGRAMS"], strip * groups)
    strips, most_splits = ceil_div(blocks, strip), 0
    launches = []
    for direction in range(1 if shared or not both else 2):
        x_length, y_length = (length, columns_of_group)[:: 1 - 2 * direction]
        column_blocks = ceil_div(y_length, statistics["BLOCK_Y"])
        split_blocks = ceil_div(column_blocks, min(column_blocks, splits_wanted))
        splits = ceil_div(column_blocks, split_blocks)
        most_splits = max(most_splits, splits)
        for first in range(0, blocks, strip):
            here = min(strip, blocks - first)
            last = first + here == blocks
            sizes = {"groups": groups, "x_length": x_length, "y_length": y_length, "offset": offset, "rows": rows}
            sizes |= {"first_block": first, "blocks": here, "split_columns": split_blocks * statistics["BLOCK_Y"]}
            sizes |= {"WIDTH": width}
            one = Prepared(completion_loss_statistics_kernel, (here * groups, splits), statistics, **sizes)
            merges = [(merge(splits), False, direction, True)] if last else []
            if shared:
                merges.append((merge(here if strips == 1 else 1 + here), True, 1, last))
            launches.append((one, direction, merges))

    def norms(first: int, last: int) -> Prepared:
        sizes = {"count": groups * (last - first), "rows": last - first, "first": first, "length": columns_of_group}
        grid = (ceil_div(sizes["count"], norm["BLOCK_ROWS"]),)
        sizes |= {"NORMALIZE": normalize, "WIDTH": width}
        return Prepared(completion_loss_norm_kernel, grid, norm, eps=eps, **sizes)

    further = norms(length, columns_of_group) if columns_of_group > length else None
    columns = (kinds, 1 + strip, groups * length) if shared else None
    return _Plan(norms(0, length), further, launches, (kinds, most_splits, count), columns, strips)


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    norm, half, merge = select("completion_loss", "forward", torch.bfloat16, arch)
    _, single, _ = select("completion_loss", "forward", torch.float32, arch)
    without_columns: dict[str, Any] = dict.fromkeys(("column_maximum_ptr", "column_total_ptr", "column_spread_ptr"))
    return [
        entry(completion_loss_norm_kernel, norm, "bf16", NORMALIZE=True),
        entry(completion_loss_norm_kernel, norm, "bf16", NORMALIZE=False, recovered_ptr=None, valid_ptr=None),
        entry(completion_loss_merge_kernel, merge, "bf16"),
        entry(completion_loss_merge_kernel, merge, "bf16", lse_ptr=None),
        entry(completion_loss_statistics_kernel, half, "bf16"),
        entry(completion_loss_statistics_kernel, half, "bf16", **without_columns),
        entry(completion_loss_statistics_kernel, single, "fp32"),
        entry(completion_loss_statistics_kernel, half, "bf16", same=True),
        entry(completion_loss_statistics_kernel, half, "bf16", same=True, **without_columns),
        entry(completion_loss_statistics_kernel, single, "fp32", same=True),
    ]
