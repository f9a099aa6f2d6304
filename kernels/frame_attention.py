"""Attention of a video frame by frame: a frame's CLS sees every token, a patch those of its own frame.

B batch, F frames, P patches, L = F * (1 + P) tokens, frame by frame and CLS first, H heads, D channels of a head.
Statistics and accumulators in float32; scores are recomputed in the backward, never stored.

A program has a tile of patch rows of one frame, or a shared tile: CLS rows of all frames and, beside each, the last
``rest`` patches of its frame. A shared tile walks over all tokens in any case, so the few patches that would leave a
tile of their own almost empty (196 = 3 * 64 + 4) cost nothing there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)

# (rows, keys, warps) by bytes of an element, for D up to 64 and for 128. Two bytes: the side that a program keeps has
# the 64 rows that an sm_90 tensor core takes, so that F CLS rows, fewer than 64, are padded to them rather than given
# to the slower 16-row instructions; 128 would leave a quarter of the tiles empty at 196 patches. Four bytes: IEEE
# products run on the ordinary cores. The other side is what fits in 240 registers. Not yet tuned on a GPU.
BY_ROW = {2: ((64, 64, 4), (64, 32, 4)), 4: ((32, 32, 8), (16, 32, 8))}
BY_KEY = {2: ((32, 64, 4), (32, 64, 8)), 4: ((32, 32, 8), (32, 16, 8))}

# Products of lengths come as arguments, since in 32 bits a kernel's own could wrap.
LENGTHS = ["shared_programs", "shared_tiles", "heads", "frames", "tokens", "length", "rest"]


@triton.jit
def load_rows(head_ptr, row, inside, row_stride, HEAD: tl.constexpr):
    """(rows, D) of one head; zero where ``inside`` (rows,) is False."""
    offset = row.to(tl.int64)[:, None] * row_stride + tl.arange(0, HEAD)[None, :]
    return tl.load(head_ptr + offset, mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(ptr, values, batch, head, row, inside, length, heads, HEAD: tl.constexpr):
    """Into one head of a contiguous (B, length, H, D)."""
    offset = ((batch * length + row.to(tl.int64)[:, None]) * heads + head) * HEAD + tl.arange(0, HEAD)[None, :]
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def tile_of_rows(
    program, shared_programs, shared_tiles, frames, tokens, length, rest, SHARED: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """batch_head; row in the sequence, whether it exists, and its frame, -1 for a CLS, each (rows,); the first key, and
    how many follow from there.

    The shared programs, which take longest, come first.
    """
    place = tl.arange(0, BLOCK_ROWS)
    if SHARED:
        batch_head = program // shared_tiles
        place += program % shared_tiles * BLOCK_ROWS
        inside = place < frames * (1 + rest)
        own, nth = place // (1 + rest), place % (1 + rest)
        row = own.to(tl.int64) * tokens + tl.where(nth == 0, 0, tokens - rest - 1 + nth)
        # A row that does not exist counts as a CLS, so that no softmax is empty.
        own = tl.where(inside & (nth > 0), own, -1)
        first, keys = 0, length
    else:
        program -= shared_programs
        tiles = tl.cdiv(tokens - 1 - rest, BLOCK_ROWS)
        batch_head, own = program // tiles // frames, program // tiles % frames
        first, keys = own.to(tl.int64) * tokens, tokens
        patch = 1 + (program % tiles).to(tl.int64) * BLOCK_ROWS + place
        row, inside = first + patch, patch < tokens - rest
    return batch_head, row, inside, own, first, keys


@triton.jit
def attended(own, column, keys, tokens, SHARED: tl.constexpr):
    """(rows, columns) bool in a shared tile; in others (1, columns), since all their rows see the same."""
    valid = (column < keys)[None, :]
    if SHARED:
        valid = valid & ((own == -1)[:, None] | (own[:, None] == (column // tokens)[None, :]))
    return valid


@triton.jit(do_not_specialize=LENGTHS)
def frame_attention_forward_kernel(
    query_ptr,  # (B, L, H, D)
    key_ptr,  # (B, L, H, D)
    value_ptr,  # (B, L, H, D)
    out_ptr,  # (B, L, H, D), contiguous
    lse_ptr,  # (B, H, L) float32, base 2
    shared_programs, shared_tiles, heads, frames, tokens, length, rest,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    scale,
    HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    scale_2 = scale * LOG2_E
    # Unrolled, so that the loop of patch tiles is compiled without the mask of shared ones.
    for SHARED in tl.static_range(2):
        if (program < shared_programs) == (SHARED == 1):
            batch_head, row, inside, own, first, keys = tile_of_rows(
                program, shared_programs, shared_tiles, frames, tokens, length, rest, SHARED, BLOCK_ROWS
            )  # fmt: skip
            batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
            query_of_head = query_ptr + batch * query_batch_stride + head * query_head_stride
            key_of_head = key_ptr + batch * key_batch_stride + head * key_head_stride + first * key_row_stride
            value_of_head = value_ptr + batch * value_batch_stride + head * value_head_stride + first * value_row_stride
            query = load_rows(query_of_head, row, inside, query_row_stride, HEAD)
            highest = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
            total = tl.zeros((BLOCK_ROWS,), tl.float32)
            out = tl.zeros((BLOCK_ROWS, HEAD), tl.float32)
            for start in range(0, keys, BLOCK_KEYS):
                column = start + tl.arange(0, BLOCK_KEYS)
                exists = column < keys
                key = load_rows(key_of_head, column, exists, key_row_stride, HEAD)
                value = load_rows(value_of_head, column, exists, value_row_stride, HEAD)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee")
                scores = tl.where(attended(own, column, keys, tokens, SHARED), scores, -float("inf"))
                raised = tl.maximum(highest, tl.max(scores, 1) * scale_2)
                pivot = raised
                if SHARED:
                    # A patch that has not met its frame yet would compute -inf - -inf.
                    pivot = tl.where(raised == -float("inf"), 0.0, raised)
                weights = tl.exp2(scores * scale_2 - pivot[:, None])
                correction = tl.exp2(highest - pivot)
                total = total * correction + tl.sum(weights, 1)
                out = tl.dot(weights.to(value.dtype), value, out * correction[:, None], input_precision="ieee")
                highest = raised
            store_rows(out_ptr, out / total[:, None], batch, head, row, inside, length, heads, HEAD)
            tl.store(lse_ptr + batch_head.to(tl.int64) * length + row, highest + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def frame_attention_backward_query_kernel(
    grad_out_ptr,  # (B, L, H, D)
    query_ptr,  # (B, L, H, D)
    key_ptr,  # (B, L, H, D)
    value_ptr,  # (B, L, H, D)
    out_ptr,  # (B, L, H, D), contiguous
    lse_ptr,  # (B, H, L) float32, base 2
    delta_ptr,  # (B, H, L) float32: rowsum(grad_out * out), written for the other kernel
    grad_query_ptr,  # (B, L, H, D), contiguous
    shared_programs, shared_tiles, heads, frames, tokens, length, rest,
    grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    scale,
    HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for SHARED in tl.static_range(2):
        if (program < shared_programs) == (SHARED == 1):
            batch_head, row, inside, own, first, keys = tile_of_rows(
                program, shared_programs, shared_tiles, frames, tokens, length, rest, SHARED, BLOCK_ROWS
            )  # fmt: skip
            batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
            grad_out_of_head = grad_out_ptr + batch * grad_out_batch_stride + head * grad_out_head_stride
            query_of_head = query_ptr + batch * query_batch_stride + head * query_head_stride
            key_of_head = key_ptr + batch * key_batch_stride + head * key_head_stride + first * key_row_stride
            value_of_head = value_ptr + batch * value_batch_stride + head * value_head_stride + first * value_row_stride
            out_of_head = out_ptr + (batch * length * heads + head) * HEAD
            query = load_rows(query_of_head, row, inside, query_row_stride, HEAD)
            grad_out = load_rows(grad_out_of_head, row, inside, grad_out_row_stride, HEAD)
            out = load_rows(out_of_head, row, inside, heads * HEAD, HEAD)
            delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
            statistics = batch_head.to(tl.int64) * length + row
            tl.store(delta_ptr + statistics, delta, mask=inside)
            lse_2 = tl.load(lse_ptr + statistics, mask=inside, other=float("inf"))
            grad_query = tl.zeros((BLOCK_ROWS, HEAD), tl.float32)
            for start in range(0, keys, BLOCK_KEYS):
                column = start + tl.arange(0, BLOCK_KEYS)
                exists = column < keys
                key = load_rows(key_of_head, column, exists, key_row_stride, HEAD)
                value = load_rows(value_of_head, column, exists, value_row_stride, HEAD)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E) - lse_2[:, None]
                # Before the exponential: a key that does not exist scores 0, and exp2(0 - lse) can overflow.
                weights = tl.exp2(tl.where(attended(own, column, keys, tokens, SHARED), scores, -float("inf")))
                grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
                grad_scores = (weights * (grad_weights - delta[:, None])).to(key.dtype)
                grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
            store_rows(grad_query_ptr, grad_query * scale, batch, head, row, inside, length, heads, HEAD)


@triton.jit(do_not_specialize=["heads", "frames", "tokens", "length"])
def frame_attention_backward_key_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,  # (B, L, H, D), contiguous
    grad_value_ptr,  # (B, L, H, D), contiguous
    heads, frames, tokens, length,
    grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    scale,
    HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_KEYS)
    tile, frame = tl.program_id(0) % tiles, tl.program_id(0) // tiles % frames
    batch_head = tl.program_id(0) // tiles // frames
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    grad_out_of_head = grad_out_ptr + batch * grad_out_batch_stride + head * grad_out_head_stride
    query_of_head = query_ptr + batch * query_batch_stride + head * query_head_stride
    key_of_head = key_ptr + batch * key_batch_stride + head * key_head_stride
    value_of_head = value_ptr + batch * value_batch_stride + head * value_head_stride
    first, patches = frame.to(tl.int64) * tokens, tokens - 1
    token = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    exists, column = token < tokens, first + token
    key = load_rows(key_of_head, column, exists, key_row_stride, HEAD)
    value = load_rows(value_of_head, column, exists, value_row_stride, HEAD)
    grad_key = tl.zeros((BLOCK_KEYS, HEAD), tl.float32)
    grad_value = tl.zeros((BLOCK_KEYS, HEAD), tl.float32)
    # Who attends to these keys, as one list: the patches of their frame, then the CLS rows of all frames.
    for start in range(0, patches + frames, BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)
        inside = place < patches + frames
        row = tl.where(place < patches, first + 1 + place, (place - patches).to(tl.int64) * tokens)
        query = load_rows(query_of_head, row, inside, query_row_stride, HEAD)
        grad_out = load_rows(grad_out_of_head, row, inside, grad_out_row_stride, HEAD)
        statistics = batch_head.to(tl.int64) * length + row
        # A row that does not exist gets the probability 0. A key that does not exist only reaches rows of the
        # accumulators that are not stored.
        lse_2 = tl.load(lse_ptr + statistics, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
        # Held as (keys, rows), so that the products that accumulate need no transposed probabilities.
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2_E) - lse_2[None, :])
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[None, :])).to(query.dtype)
        grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
    store_rows(grad_key_ptr, grad_key * scale, batch, head, column, exists, length, heads, HEAD)
    store_rows(grad_value_ptr, grad_value, batch, head, column, exists, length, heads, HEAD)


def shared_patches(frames: int, tokens: int, rows: int, keys: int) -> int:
    """How many patches of each frame share tiles with the CLS rows: those that do not fill a tile, if that is less work
    (in tiles of scores) than a tile of their own."""
    rest, blocks = (tokens - 1) % rows, triton.cdiv(frames * tokens, keys)
    together = triton.cdiv(frames * (1 + rest), rows) * blocks
    apart = frames * triton.cdiv(tokens, keys) + triton.cdiv(frames, rows) * blocks
    return rest if together < apart else 0


def _strides(**tensors: Tensor) -> dict[str, int]:
    places = (("batch", 0), ("row", 1), ("head", 2))
    return {f"{name}_{place}_stride": t.stride(i) for name, t in tensors.items() for place, i in places}


def _constants(tiles: tuple[int, int, int], head: int) -> dict[str, int]:
    return {"HEAD": head, "BLOCK_ROWS": tiles[0], "BLOCK_KEYS": tiles[1], "num_warps": tiles[2]}


def _launch_by_row(kernel, query: Tensor, frames: int, **arguments) -> None:
    batch, length, heads, head = query.shape
    tokens = length // frames
    rows, keys, _ = tiles = BY_ROW[query.dtype.itemsize][head == 128]
    rest = shared_patches(frames, tokens, rows, keys)
    shared_tiles = triton.cdiv(frames * (1 + rest), rows)
    kernel[(batch * heads * (shared_tiles + frames * triton.cdiv(tokens - 1 - rest, rows)),)](
        query_ptr=query, shared_programs=batch * heads * shared_tiles, shared_tiles=shared_tiles, heads=heads,
        frames=frames, tokens=tokens, length=length, rest=rest, **arguments, **_constants(tiles, head),
        enable_fp_fusion=True,
    )  # fmt: skip


def frame_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, frames: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """(B, L, H, D) each, channels contiguous, L a multiple of ``frames`` above 0: out, and base-2 LSE (B, H, L)."""
    batch, length, heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    if lse.numel():
        _launch_by_row(
            frame_attention_forward_kernel, query, frames, key_ptr=key, value_ptr=value, out_ptr=out, lse_ptr=lse,
            scale=softmax_scale, **_strides(query=query, key=key, value=value),
        )  # fmt: skip
    return out, lse


def frame_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    frames: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, in two launches."""
    batch, length, heads, head = query.shape
    grad_query, grad_key, grad_value = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)
    )
    if lse.numel():
        delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
        arguments = {
            "grad_out_ptr": grad_out, "key_ptr": key, "value_ptr": value, "lse_ptr": lse, "delta_ptr": delta,
            "scale": softmax_scale, **_strides(grad_out=grad_out, query=query, key=key, value=value),
        }  # fmt: skip
        _launch_by_row(
            frame_attention_backward_query_kernel, query, frames, out_ptr=out, grad_query_ptr=grad_query, **arguments
        )  # fmt: skip
        tiles, tokens = BY_KEY[query.dtype.itemsize][head == 128], length // frames
        frame_attention_backward_key_kernel[(batch * heads * frames * triton.cdiv(tokens, tiles[1]),)](
            query_ptr=query, grad_key_ptr=grad_key, grad_value_ptr=grad_value, heads=heads, frames=frames,
            tokens=tokens, length=length, **arguments, **_constants(tiles, head), enable_fp_fusion=True,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _entry(kernel, dtype: str, head: int, tiles: tuple[int, int, int]) -> dict:
    constants = _constants(tiles, head)
    warps = constants.pop("num_warps")
    statistics = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32"}
    return {
        "kernel": kernel,
        "signature": {name: dtype for name in kernel.arg_names if name.endswith("_ptr")} | statistics,
        "constants": constants,
        "num_warps": warps,
        "divisible": [name for name in kernel.arg_names if name.endswith("_stride")],
    }


# What the static checks compile.
AHEAD_OF_TIME = [
    _entry(kernel, dtype, 64, table[size][0])
    for dtype, size in (("*bf16", 2), ("*fp32", 4))
    for kernel, table in (
        (frame_attention_forward_kernel, BY_ROW),
        (frame_attention_backward_query_kernel, BY_ROW),
        (frame_attention_backward_key_kernel, BY_KEY),
    )
]
