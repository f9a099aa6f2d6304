"""Completion loss in tiles: normalisation, similarity, both log-sum-exps, loss and gradients; N x N is never stored.

G groups of N rows of D features, contiguous. Statistics in float32. The two directions are the same kernel with the
roles of the features swapped: each row adds up its own tiles in a fixed order, so that reruns are equal to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a tile of similarities, chunk of features for its dots, chunk of features of a gradient, warps
# of the statistics and of the gradient. IEEE float32 dots run without tensor cores and hold their operands in
# registers, hence the smaller tiles. Not yet tuned on a GPU.
HALF = {"BLOCK_X": 64, "BLOCK_Y": 128, "BLOCK_K": 64}, {"BLOCK_X": 64, "BLOCK_Y": 64, "BLOCK_K": 32, "BLOCK_D": 128}
SINGLE = {"BLOCK_X": 64, "BLOCK_Y": 64, "BLOCK_K": 32}, {"BLOCK_X": 32, "BLOCK_Y": 32, "BLOCK_K": 32, "BLOCK_D": 128}
STATISTICS_WARPS, GRADIENT_WARPS = 4, 8
# Rows of the kernels that read each feature once.
BLOCK_ROWS, BLOCK_WIDTH, ROW_WARPS = 8, 128, 4
MERGE_ROWS = 128
# Columns are split until there are two programs for each of an H200's 132 multiprocessors; a constant, so that the
# order of the sums does not depend on the machine.
PROGRAMS = 264

# Not minus infinity, whose differences are NaN; far below any similarity, and a sum of many is still finite.
EXCLUDED = tl.constexpr(-1e30)


@triton.jit
def rows_taking_part(valid_ptr, row, inside):
    if valid_ptr is not None:
        inside = inside & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    return inside


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


@triton.jit
def tile(ptr, inside, start, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of the rows from ptr on; rows outside are zeros, whatever they hold.

    The caller's pointer carries the 64-bit offset: within a tile 32 bits suffice, and take half the registers.
    """
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)


@triton.jit
def dots(x_ptr, y_ptr, x_in, y_in, WIDTH: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, K: tl.constexpr):
    """(X, Y) float32: dot products of the rows from x_ptr on with those from y_ptr on."""
    products = tl.zeros((X, Y), tl.float32)
    for start in range(0, WIDTH, K):
        x = tile(x_ptr, x_in, start, WIDTH, X, K)
        y = tile(y_ptr, y_in, start, WIDTH, Y, K)
        products = tl.dot(x, tl.trans(y), products, input_precision="ieee")
    return products


@triton.jit
def completion_loss_norm_kernel(
    recovered_ptr,  # (G N, D)
    complete_ptr,  # (G N, D)
    valid_ptr,  # (G N,) uint8 or None
    temperature_ptr,  # (1,) float32
    rnorm_ptr,  # (2, G N) float32: 1 / max(norm, eps) of recovered and complete
    positive_ptr,  # (G N,) float32: similarity of a row with its own
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    takes_part = rows_taking_part(valid_ptr, row, inside)
    recovered_square = tl.zeros((BLOCK_ROWS,), tl.float32)
    complete_square = tl.zeros((BLOCK_ROWS,), tl.float32)
    product = tl.zeros((BLOCK_ROWS,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS * WIDTH
    for start in range(0, WIDTH, BLOCK_WIDTH):
        recovered = tile(recovered_ptr + first, takes_part, start, WIDTH, BLOCK_ROWS, BLOCK_WIDTH).to(tl.float32)
        complete = tile(complete_ptr + first, takes_part, start, WIDTH, BLOCK_ROWS, BLOCK_WIDTH).to(tl.float32)
        recovered_square += tl.sum(recovered * recovered, axis=1)
        complete_square += tl.sum(complete * complete, axis=1)
        product += tl.sum(recovered * complete, axis=1)
    recovered_rnorm = 1.0 / tl.maximum(tl.sqrt(recovered_square), eps)
    complete_rnorm = 1.0 / tl.maximum(tl.sqrt(complete_square), eps)
    positive = product * recovered_rnorm * complete_rnorm / tl.load(temperature_ptr)
    tl.store(rnorm_ptr + row, recovered_rnorm, mask=inside)
    tl.store(rnorm_ptr + rows.to(tl.int64) + row, complete_rnorm, mask=inside)
    tl.store(positive_ptr + row, positive, mask=inside)


@triton.jit
def completion_loss_statistics_kernel(
    x_ptr,  # (G N, D), the anchors
    y_ptr,  # (G N, D)
    valid_ptr,  # (G N,) uint8 or None
    temperature_ptr,  # (1,) float32
    x_rnorm_ptr,  # (G N,) float32
    y_rnorm_ptr,  # (G N,) float32
    positive_ptr,  # (G N,) float32
    maximum_ptr,  # (splits, G N) float32, over the columns of a split
    total_ptr,  # (splits, G N) float32: sum of exp(s - maximum)
    spread_ptr,  # (splits, G N) float32 or None: sum of exp(s - maximum) (s - positive)
    groups,
    length,
    split_columns,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(length, BLOCK_X)
    base = (tl.program_id(0) // blocks).to(tl.int64) * length
    x_start = (tl.program_id(0) % blocks) * BLOCK_X
    x = x_start + tl.arange(0, BLOCK_X)
    x_row = base + x
    x_in = rows_taking_part(valid_ptr, x_row, x < length)
    x_ptr += (base + x_start) * WIDTH
    y_ptr += base * WIDTH
    x_scale = tl.load(x_rnorm_ptr + x_row, mask=x_in, other=0.0) / tl.load(temperature_ptr)
    positive = tl.load(positive_ptr + x_row, mask=x_in, other=0.0)
    maximum = tl.full((BLOCK_X,), EXCLUDED, tl.float32)
    total = tl.zeros((BLOCK_X,), tl.float32)
    spread = tl.zeros((BLOCK_X,), tl.float32)
    first = tl.program_id(1) * split_columns
    last = tl.minimum(first + split_columns, length)
    for start in range(first, last, BLOCK_Y):
        y = start + tl.arange(0, BLOCK_Y)
        y_row = base + y
        y_tile_ptr = y_ptr + tl.cast(start, tl.int64) * WIDTH
        y_in = rows_taking_part(valid_ptr, y_row, y < length)
        y_scale = tl.load(y_rnorm_ptr + y_row, mask=y_in, other=0.0)
        similarity = dots(x_ptr, y_tile_ptr, x_in, y_in, WIDTH, BLOCK_X, BLOCK_Y, BLOCK_K)
        similarity = similarity * x_scale[:, None] * y_scale[None, :]
        counts = x_in[:, None] & y_in[None, :] & (x[:, None] != y[None, :])
        similarity = tl.where(counts, similarity, EXCLUDED)
        raised = tl.maximum(maximum, tl.max(similarity, axis=1))
        shrink = tl.exp(maximum - raised)
        weight = tl.exp(similarity - raised[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        if spread_ptr is not None:
            spread = spread * shrink + tl.sum(weight * (similarity - positive[:, None]), axis=1)
        maximum = raised
    out = tl.program_id(1).to(tl.int64) * groups * length + x_row
    tl.store(maximum_ptr + out, maximum, mask=x < length)
    tl.store(total_ptr + out, total, mask=x < length)
    if spread_ptr is not None:
        tl.store(spread_ptr + out, spread, mask=x < length)


@triton.jit
def completion_loss_merge_kernel(
    maximum_ptr,  # (splits, G N) float32
    total_ptr,  # (splits, G N) float32
    spread_ptr,  # (splits, G N) float32 or None
    positive_ptr,  # (G N,) float32
    previous_ptr,  # (G N,) float32 or None: loss of the other direction
    lse_ptr,  # (G N,) float32: log-sum-exp over the other pairs
    mean_spread_ptr,  # (G N,) float32 or None: mean of s - positive under the softmax over the other pairs
    losses_ptr,  # (G N,) float32
    rows,
    splits,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    positive = tl.load(positive_ptr + row, mask=inside, other=0.0)
    maximum = tl.full((BLOCK_ROWS,), EXCLUDED, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    spread = tl.zeros((BLOCK_ROWS,), tl.float32)
    offset = row
    for _ in range(0, splits):
        part = tl.load(maximum_ptr + offset, mask=inside, other=EXCLUDED)
        raised = tl.maximum(maximum, part)
        shrink, part_shrink = tl.exp(maximum - raised), tl.exp(part - raised)
        total = total * shrink + tl.load(total_ptr + offset, mask=inside, other=1.0) * part_shrink
        if spread_ptr is not None:
            spread = spread * shrink + tl.load(spread_ptr + offset, mask=inside, other=0.0) * part_shrink
        maximum = raised
        offset += rows
    lse = maximum + tl.log(total)
    loss = softplus(lse - positive)
    if previous_ptr is not None:
        loss += tl.load(previous_ptr + row, mask=inside, other=0.0)
    tl.store(lse_ptr + row, lse, mask=inside)
    tl.store(losses_ptr + row, loss, mask=inside)
    if spread_ptr is not None:
        tl.store(mean_spread_ptr + row, spread / total, mask=inside)


@triton.jit
def anchor_weight(grad_ptr, positive_ptr, lse_ptr, row, takes_part):
    """Upstream gradient times sigmoid(lse - positive), and the lse."""
    lse = tl.load(lse_ptr + row, mask=takes_part, other=0.0)
    positive = tl.load(positive_ptr + row, mask=takes_part, other=0.0)
    grad = tl.load(grad_ptr + row, mask=takes_part, other=0.0)
    return grad * tl.sigmoid(lse - positive), lse


@triton.jit
def completion_loss_gradient_kernel(
    grad_ptr,  # (G N,) float32, of the losses
    x_ptr,  # (G N, D), whose gradient this is
    y_ptr,  # (G N, D)
    valid_ptr,  # (G N,) uint8 or None
    temperature_ptr,  # (1,) float32
    x_rnorm_ptr,  # (G N,) float32
    y_rnorm_ptr,  # (G N,) float32
    positive_ptr,  # (G N,) float32
    x_lse_ptr,  # (G N,) float32, or None where x are no anchors
    y_lse_ptr,  # (G N,) float32, or None where y are no anchors
    grad_x_ptr,  # (G N, D)
    length,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(length, BLOCK_X)
    base = (tl.program_id(0) // blocks).to(tl.int64) * length
    x_start = (tl.program_id(0) % blocks) * BLOCK_X
    x = x_start + tl.arange(0, BLOCK_X)
    x_row = base + x
    x_in = rows_taking_part(valid_ptr, x_row, x < length)
    x_ptr += (base + x_start) * WIDTH
    y_ptr += base * WIDTH
    temperature = tl.load(temperature_ptr)
    x_rnorm = tl.load(x_rnorm_ptr + x_row, mask=x_in, other=0.0)
    pull = tl.zeros((BLOCK_X,), tl.float32)
    if x_lse_ptr is not None:
        x_weight, x_lse = anchor_weight(grad_ptr, positive_ptr, x_lse_ptr, x_row, x_in)
        pull += x_weight
    if y_lse_ptr is not None:
        pull += anchor_weight(grad_ptr, positive_ptr, y_lse_ptr, x_row, x_in)[0]
    d_start = tl.program_id(1) * BLOCK_D
    push = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    radial = tl.zeros((BLOCK_X,), tl.float32)
    # Hoisted out of the loop, the addresses of every tile together would spill.
    for start in tl.range(0, length, BLOCK_Y, disable_licm=True):
        y = start + tl.arange(0, BLOCK_Y)
        y_row = base + y
        y_tile_ptr = y_ptr + tl.cast(start, tl.int64) * WIDTH
        y_in = rows_taking_part(valid_ptr, y_row, y < length)
        y_rnorm = tl.load(y_rnorm_ptr + y_row, mask=y_in, other=0.0)
        products = dots(x_ptr, y_tile_ptr, x_in, y_in, WIDTH, BLOCK_X, BLOCK_Y, BLOCK_K)
        similarity = products * (x_rnorm / temperature)[:, None] * y_rnorm[None, :]
        weight = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
        if x_lse_ptr is not None:
            weight += x_weight[:, None] * tl.exp(similarity - x_lse[:, None])
        if y_lse_ptr is not None:
            y_weight, y_lse = anchor_weight(grad_ptr, positive_ptr, y_lse_ptr, y_row, y_in)
            weight += y_weight[None, :] * tl.exp(similarity - y_lse[None, :])
        counts = x_in[:, None] & y_in[None, :] & (x[:, None] != y[None, :])
        weight = tl.where(counts, weight * y_rnorm[None, :], 0.0)
        features = tile(y_tile_ptr, y_in, d_start, WIDTH, BLOCK_Y, BLOCK_D)
        if features.dtype == tl.float16:
            # Weights of confident positives lie below float16's smallest number: scaled by the largest of their row.
            largest = tl.max(tl.abs(weight), axis=1)
            rounded = (weight / tl.where(largest > 0, largest, 1.0)[:, None]).to(tl.float16)
            push += tl.dot(rounded, features, input_precision="ieee") * largest[:, None]
            weight = rounded.to(tl.float32) * largest[:, None]
        else:
            rounded = weight.to(features.dtype)
            push = tl.dot(rounded, features, push, input_precision="ieee")
            weight = rounded.to(tl.float32)
        # The component along x, from the weights as they were rounded: every chunk of D has it without the others.
        radial += tl.sum(weight * products, axis=1)
    own_x = tile(x_ptr, x_in, d_start, WIDTH, BLOCK_X, BLOCK_D).to(tl.float32) * x_rnorm[:, None]
    own_y_ptr = y_ptr + tl.cast(x_start, tl.int64) * WIDTH
    own_y = tile(own_y_ptr, x_in, d_start, WIDTH, BLOCK_X, BLOCK_D).to(tl.float32)
    own_y *= tl.load(y_rnorm_ptr + x_row, mask=x_in, other=0.0)[:, None]
    cosine = tl.load(positive_ptr + x_row, mask=x_in, other=0.0) * temperature
    # A norm below eps was replaced by eps, a constant: nothing to project away.
    radial = tl.where(x_rnorm < 1.0 / eps, radial * x_rnorm - pull * cosine, 0.0)
    grad_x = (push - pull[:, None] * own_y - radial[:, None] * own_x) * (x_rnorm / temperature)[:, None]
    d = d_start + tl.arange(0, BLOCK_D)
    out = grad_x_ptr + (base + x_start) * WIDTH + tl.arange(0, BLOCK_X)[:, None] * WIDTH + d[None, :]
    tl.store(out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=(x < length)[:, None] & (d < WIDTH)[None, :])


def _gradient_tiles(dtype: torch.dtype, width: int) -> dict[str, int]:
    tiles = dict((SINGLE if dtype == torch.float32 else HALF)[1])
    tiles["BLOCK_D"] = min(tiles["BLOCK_D"], max(16, triton.next_power_of_2(width)))
    return tiles


def completion_loss_forward(
    recovered: Tensor, complete: Tensor, temperature: Tensor, valid: Tensor | None, both: bool, spread: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """recovered, complete (G, N, D) contiguous; temperature () float32; valid (G, N) bool, contiguous.

    Returns float32 losses (G, N), positive (G, N), lse (directions, G, N), mean spread (directions or 0, G, N) and
    rnorm (2, G, N).
    """
    groups, length, width = recovered.shape
    rows, directions = groups * length, 2 if both else 1
    kwargs = {"dtype": torch.float32, "device": recovered.device}
    losses, positive = torch.empty((groups, length), **kwargs), torch.empty((groups, length), **kwargs)
    lse, rnorm = torch.empty((directions, groups, length), **kwargs), torch.empty((2, groups, length), **kwargs)
    mean_spread = torch.empty((directions if spread else 0, groups, length), **kwargs)
    if not rows:
        return losses, positive, lse, mean_spread, rnorm
    valid = None if valid is None else valid.view(torch.uint8)
    completion_loss_norm_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
        recovered_ptr=recovered,
        complete_ptr=complete,
        valid_ptr=valid,
        temperature_ptr=temperature,
        rnorm_ptr=rnorm,
        positive_ptr=positive,
        rows=rows,
        eps=eps,
        WIDTH=width,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_WIDTH=BLOCK_WIDTH,
        num_warps=ROW_WARPS,
        enable_fp_fusion=True,
    )
    tiles = (SINGLE if recovered.dtype == torch.float32 else HALF)[0]
    blocks, column_blocks = triton.cdiv(length, tiles["BLOCK_X"]), triton.cdiv(length, tiles["BLOCK_Y"])
    split_blocks = triton.cdiv(column_blocks, min(column_blocks, triton.cdiv(PROGRAMS, blocks * groups)))
    splits = triton.cdiv(column_blocks, split_blocks)
    partial = torch.empty((3 if spread else 2, splits, rows), **kwargs)
    for direction in range(directions):
        x, y = (recovered, complete) if direction == 0 else (complete, recovered)
        completion_loss_statistics_kernel[(blocks * groups, splits)](
            x_ptr=x,
            y_ptr=y,
            valid_ptr=valid,
            temperature_ptr=temperature,
            x_rnorm_ptr=rnorm[direction],
            y_rnorm_ptr=rnorm[1 - direction],
            positive_ptr=positive,
            maximum_ptr=partial[0],
            total_ptr=partial[1],
            spread_ptr=partial[2] if spread else None,
            groups=groups,
            length=length,
            split_columns=split_blocks * tiles["BLOCK_Y"],
            WIDTH=width,
            **tiles,
            num_warps=STATISTICS_WARPS,
            enable_fp_fusion=True,
        )
        completion_loss_merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            maximum_ptr=partial[0],
            total_ptr=partial[1],
            spread_ptr=partial[2] if spread else None,
            positive_ptr=positive,
            previous_ptr=losses if direction else None,
            lse_ptr=lse[direction],
            mean_spread_ptr=mean_spread[direction] if spread else None,
            losses_ptr=losses,
            rows=rows,
            splits=splits,
            BLOCK_ROWS=MERGE_ROWS,
            num_warps=ROW_WARPS,
            enable_fp_fusion=True,
        )
    return losses, positive, lse, mean_spread, rnorm


def completion_loss_gradient(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    temperature: Tensor,
    valid: Tensor | None,
    positive: Tensor,
    x_lse: Tensor | None,
    y_lse: Tensor | None,
    x_rnorm: Tensor,
    y_rnorm: Tensor,
    eps: float,
) -> Tensor:
    """Gradient (G, N, D) of x in its dtype, from that of the losses (G, N) float32; the lse of a direction that is
    not wanted is None."""
    groups, length, width = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad_x.numel():
        tiles = _gradient_tiles(x.dtype, width)
        grid = triton.cdiv(length, tiles["BLOCK_X"]) * groups, triton.cdiv(width, tiles["BLOCK_D"])
        completion_loss_gradient_kernel[grid](
            grad_ptr=grad,
            x_ptr=x,
            y_ptr=y,
            valid_ptr=None if valid is None else valid.view(torch.uint8),
            temperature_ptr=temperature,
            x_rnorm_ptr=x_rnorm,
            y_rnorm_ptr=y_rnorm,
            positive_ptr=positive,
            x_lse_ptr=x_lse,
            y_lse_ptr=y_lse,
            grad_x_ptr=grad_x,
            length=length,
            eps=eps,
            WIDTH=width,
            **tiles,
            num_warps=GRADIENT_WARPS,
            enable_fp_fusion=True,
        )
    return grad_x


_FLOATS = (
    "temperature_ptr", "rnorm_ptr", "x_rnorm_ptr", "y_rnorm_ptr", "positive_ptr", "maximum_ptr", "total_ptr",
    "spread_ptr", "previous_ptr", "lse_ptr", "mean_spread_ptr", "losses_ptr", "grad_ptr", "x_lse_ptr", "y_lse_ptr",
)  # fmt: skip


def _entry(kernel, features: str, warps: int, **constants) -> dict:
    signature = {name: "*fp32" for name in _FLOATS} | {"valid_ptr": "*u8", "eps": "fp32"}
    signature |= {name: f"*{features}" for name in ("recovered_ptr", "complete_ptr", "x_ptr", "y_ptr", "grad_x_ptr")}
    signature = {name: kind for name, kind in signature.items() if name in kernel.arg_names and name not in constants}
    # The model's width; the merge knows no features.
    widths = {"WIDTH": 768} if "WIDTH" in kernel.arg_names else {}
    return {"kernel": kernel, "signature": signature, "constants": constants | widths, "num_warps": warps}


# What the static checks compile: kernel, argument types, constants, warps.
AHEAD_OF_TIME = [
    _entry(completion_loss_norm_kernel, "bf16", ROW_WARPS, BLOCK_ROWS=BLOCK_ROWS, BLOCK_WIDTH=BLOCK_WIDTH),
    _entry(completion_loss_merge_kernel, "bf16", ROW_WARPS, BLOCK_ROWS=MERGE_ROWS),
    _entry(completion_loss_statistics_kernel, "bf16", STATISTICS_WARPS, **HALF[0]),
    _entry(completion_loss_statistics_kernel, "bf16", STATISTICS_WARPS, valid_ptr=None, spread_ptr=None, **HALF[0]),
    _entry(completion_loss_statistics_kernel, "fp32", STATISTICS_WARPS, **SINGLE[0]),
    _entry(completion_loss_gradient_kernel, "bf16", GRADIENT_WARPS, **HALF[1]),
    _entry(completion_loss_gradient_kernel, "bf16", GRADIENT_WARPS, valid_ptr=None, **HALF[1]),
    _entry(completion_loss_gradient_kernel, "fp16", GRADIENT_WARPS, **HALF[1]),
    _entry(completion_loss_gradient_kernel, "fp32", GRADIENT_WARPS, **SINGLE[1]),
]
