"""Attention of a video frame by frame: a frame's CLS sees every token, a patch those of its own frame.

B batch, F frames, P patches, L = F * (1 + P) tokens, frame by frame and CLS first, H heads, D head_dim.
Statistics and accumulators in float32; scores are recomputed in the backward, never stored.

A program has a tile of patch rows of one frame, or a shared tile: CLS rows of all frames and, beside each, the last
``rest`` patches of its frame. A shared tile reads all tokens anyway, so the few patches that would leave a tile
of their own almost empty (196 = 3 * 64 + 4) cost nothing there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import Configs, Features, LaunchConfig, of_kernel, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.launch import Prepared, static_entry

LOG2_E = tl.constexpr(1.4426950408889634)

# Products of lengths come as arguments, since in 32 bits a kernel's own could wrap.
DYNAMIC_ARGS = ["shared_programs", "shared_tiles", "heads", "frames", "tokens", "length", "rest"]


@triton.jit
def load_rows(head_ptr, row, inside, row_stride, HEAD_DIM: tl.constexpr):
    """(rows, D) of one head; zero where ``inside`` (rows,) is False."""
    offset = row.to(tl.int64)[:, None] * row_stride + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(head_ptr + offset, mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(ptr, values, batch, head, row, inside, length, heads, HEAD_DIM: tl.constexpr):
    """Into one head of a contiguous (B, length, H, D)."""
    offset = ((batch * length + row.to(tl.int64)[:, None]) * heads + head) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def tile_of_rows(
    program, shared_programs, shared_tiles, frames, tokens, length, rest, SHARED: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """batch_head; row in the sequence, whether it exists, and its frame, -1 for a CLS, each (rows,); the first key, and
    how many follow from there.

    The shared programs, which take longest, come first.
    """
    slot = tl.arange(0, BLOCK_ROWS)
    if SHARED:
        batch_head = program // shared_tiles
        slot += program % shared_tiles * BLOCK_ROWS
        inside = slot < frames * (1 + rest)
        frame_of_row, nth = slot // (1 + rest), slot % (1 + rest)
        row = frame_of_row.to(tl.int64) * tokens + tl.where(nth == 0, 0, tokens - rest - 1 + nth)
        # A row that does not exist counts as a CLS, so that no softmax is empty.
        frame_of_row = tl.where(inside & (nth > 0), frame_of_row, -1)
        first, keys = 0, length
    else:
        program -= shared_programs
        tiles = tl.cdiv(tokens - 1 - rest, BLOCK_ROWS)
        batch_head, frame_of_row = program // tiles // frames, program // tiles % frames
        first, keys = frame_of_row.to(tl.int64) * tokens, tokens
        patch = 1 + (program % tiles).to(tl.int64) * BLOCK_ROWS + slot
        row, inside = first + patch, patch < tokens - rest
    return batch_head, row, inside, frame_of_row, first, keys


@triton.jit
def frame_mask(frame_of_row, column, keys, tokens, SHARED: tl.constexpr):
    """(rows, columns) bool in a shared tile; in others (1, columns), since all their rows see the same."""
    valid = (column < keys)[None, :]
    if SHARED:
        valid = valid & ((frame_of_row == -1)[:, None] | (frame_of_row[:, None] == (column // tokens)[None, :]))
    return valid


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
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
    HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    scale_2 = scale * LOG2_E
    # Unrolled, so that the loop of patch tiles is compiled without the mask of shared ones.
    for SHARED in tl.static_range(2):
        if (program < shared_programs) == (SHARED == 1):
            batch_head, row, inside, frame_of_row, first, keys = tile_of_rows(
                program, shared_programs, shared_tiles, frames, tokens, length, rest, SHARED, BLOCK_ROWS
            )  # fmt: skip
            batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
            query_of_head = query_ptr + batch * query_batch_stride + head * query_head_stride
            key_of_head = key_ptr + batch * key_batch_stride + head * key_head_stride + first * key_row_stride
            value_of_head = value_ptr + batch * value_batch_stride + head * value_head_stride + first * value_row_stride
            query = load_rows(query_of_head, row, inside, query_row_stride, HEAD_DIM)
            m_i = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
            l_i = tl.zeros((BLOCK_ROWS,), tl.float32)
            out = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
            for start in range(0, keys, BLOCK_KEYS):
                column = start + tl.arange(0, BLOCK_KEYS)
                exists = column < keys
                key = load_rows(key_of_head, column, exists, key_row_stride, HEAD_DIM)
                value = load_rows(value_of_head, column, exists, value_row_stride, HEAD_DIM)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee")
                scores = tl.where(frame_mask(frame_of_row, column, keys, tokens, SHARED), scores, -float("inf"))
                m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_2)
                pivot = m_new
                if SHARED:
                    # A patch that has not met its frame yet would compute -inf - -inf.
                    pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
                p = tl.exp2(scores * scale_2 - pivot[:, None])
                alpha = tl.exp2(m_i - pivot)
                l_i = l_i * alpha + tl.sum(p, 1)
                out = tl.dot(p.to(value.dtype), value, out * alpha[:, None], input_precision="ieee")
                m_i = m_new
            store_rows(out_ptr, out / l_i[:, None], batch, head, row, inside, length, heads, HEAD_DIM)
            tl.store(lse_ptr + batch_head.to(tl.int64) * length + row, m_i + tl.log2(l_i), mask=inside)


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
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
    HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for SHARED in tl.static_range(2):
        if (program < shared_programs) == (SHARED == 1):
            batch_head, row, inside, frame_of_row, first, keys = tile_of_rows(
                program, shared_programs, shared_tiles, frames, tokens, length, rest, SHARED, BLOCK_ROWS
            )  # fmt: skip
            batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
            grad_out_of_head = grad_out_ptr + batch * grad_out_batch_stride + head * grad_out_head_stride
            query_of_head = query_ptr + batch * query_batch_stride + head * query_head_stride
            key_of_head = key_ptr + batch * key_batch_stride + head * key_head_stride + first * key_row_stride
            value_of_head = value_ptr + batch * value_batch_stride + head * value_head_stride + first * value_row_stride
            out_of_head = out_ptr + (batch * length * heads + head) * HEAD_DIM
            query = load_rows(query_of_head, row, inside, query_row_stride, HEAD_DIM)
            grad_out = load_rows(grad_out_of_head, row, inside, grad_out_row_stride, HEAD_DIM)
            out = load_rows(out_of_head, row, inside, heads * HEAD_DIM, HEAD_DIM)
            delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
            statistics = batch_head.to(tl.int64) * length + row
            tl.store(delta_ptr + statistics, delta, mask=inside)
            lse_2 = tl.load(lse_ptr + statistics, mask=inside, other=float("inf"))
            grad_query = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
            for start in range(0, keys, BLOCK_KEYS):
                column = start + tl.arange(0, BLOCK_KEYS)
                exists = column < keys
                key = load_rows(key_of_head, column, exists, key_row_stride, HEAD_DIM)
                value = load_rows(value_of_head, column, exists, value_row_stride, HEAD_DIM)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E) - lse_2[:, None]
                # Before the exponential: a key that does not exist scores 0, and exp2(0 - lse) can overflow.
                p = tl.exp2(tl.where(frame_mask(frame_of_row, column, keys, tokens, SHARED), scores, -float("inf")))
                grad_p = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
                grad_scores = (p * (grad_p - delta[:, None])).to(key.dtype)
                grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
            store_rows(grad_query_ptr, grad_query * scale, batch, head, row, inside, length, heads, HEAD_DIM)


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
    HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
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
    key = load_rows(key_of_head, column, exists, key_row_stride, HEAD_DIM)
    value = load_rows(value_of_head, column, exists, value_row_stride, HEAD_DIM)
    grad_key = tl.zeros((BLOCK_KEYS, HEAD_DIM), tl.float32)
    grad_value = tl.zeros((BLOCK_KEYS, HEAD_DIM), tl.float32)
    # Who attends to these keys, as one list: the patches of their frame, then the CLS rows of all frames.
    for start in range(0, patches + frames, BLOCK_ROWS):
        slot = start + tl.arange(0, BLOCK_ROWS)
        inside = slot < patches + frames
        row = tl.where(slot < patches, first + 1 + slot, (slot - patches).to(tl.int64) * tokens)
        query = load_rows(query_of_head, row, inside, query_row_stride, HEAD_DIM)
        grad_out = load_rows(grad_out_of_head, row, inside, grad_out_row_stride, HEAD_DIM)
        statistics = batch_head.to(tl.int64) * length + row
        # A row that does not exist gets the probability 0. A key that does not exist only reaches rows of the
        # accumulators that are not stored.
        lse_2 = tl.load(lse_ptr + statistics, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
        # Held as (keys, rows), so that the products that accumulate need no transposed probabilities.
        p = tl.exp2(tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2_E) - lse_2[None, :])
        grad_p = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        grad_value = tl.dot(p.to(grad_out.dtype), grad_out, grad_value, input_precision="ieee")
        grad_scores = (p * (grad_p - delta[None, :])).to(query.dtype)
        grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
    store_rows(grad_key_ptr, grad_key * scale, batch, head, column, exists, length, heads, HEAD_DIM)
    store_rows(grad_value_ptr, grad_value, batch, head, column, exists, length, heads, HEAD_DIM)


def shared_patches(frames: int, tokens: int, rows: int, keys: int) -> int:
    """How many patches of each frame share tiles with the CLS rows: those that do not fill a tile, if that is less work
    (in tiles of scores) than a tile of their own."""
    rest, blocks = (tokens - 1) % rows, ceil_div(frames * tokens, keys)
    together = ceil_div(frames * (1 + rest), rows) * blocks
    apart = frames * ceil_div(tokens, keys) + ceil_div(frames, rows) * blocks
    return rest if together < apart else 0


def _strides(*tensors: tuple[str, tuple[int, ...]]) -> dict[str, int]:
    axes = (("batch", 0), ("row", 1), ("head", 2))
    return {f"{name}_{axis_name}_stride": strides[i] for name, strides in tensors for axis_name, i in axes}


def _by_row(kernel: Any, config: LaunchConfig, shape: torch.Size, frames: int, **numbers: Any) -> Prepared:
    batch, length, heads, head_dim = shape
    tokens, rows = length // frames, config["BLOCK_ROWS"]
    rest = shared_patches(frames, tokens, rows, config["BLOCK_KEYS"])
    shared_tiles = ceil_div(frames * (1 + rest), rows)
    programs = batch * heads * (shared_tiles + frames * ceil_div(tokens - 1 - rest, rows))
    return Prepared(
        kernel, (programs,), config, shared_programs=batch * heads * shared_tiles, shared_tiles=shared_tiles,
        heads=heads, frames=frames, tokens=tokens, length=length, rest=rest, HEAD_DIM=head_dim, **numbers,
    )  # fmt: skip


@settled
def _prepare(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, shape: torch.Size, frames: int,
    softmax_scale: float, *strides: tuple[int, ...],
) -> Prepared:  # fmt: skip
    like, head_dim = Features(dtype, device), shape[-1]
    (chosen,) = resolve(config, ("frame_attention_forward_kernel",), like, head_dim=head_dim)
    numbers = _strides(*zip(("query", "key", "value"), strides, strict=True))
    return _by_row(frame_attention_forward_kernel, chosen, shape, frames, scale=softmax_scale, **numbers)


@settled
def _prepare_backward(
    config: Configs, dtype: torch.dtype, device: torch.device, shape: torch.Size, frames: int, softmax_scale: float,
    *strides: tuple[int, ...],
) -> tuple[Prepared, Prepared]:  # fmt: skip
    names = ("frame_attention_backward_query_kernel", "frame_attention_backward_key_kernel")
    batch, length, heads, head_dim = shape
    configs = resolve(config, names, Features(dtype, device), head_dim=head_dim)
    by_query, by_key = (of_kernel(configs, name) for name in names)
    numbers: dict[str, Any] = _strides(*zip(("grad_out", "query", "key", "value"), strides, strict=True))
    numbers["scale"] = softmax_scale
    tokens = length // frames
    programs = batch * heads * frames * ceil_div(tokens, by_key["BLOCK_KEYS"])
    return _by_row(frame_attention_backward_query_kernel, by_query, shape, frames, **numbers), Prepared(
        frame_attention_backward_key_kernel, (programs,), by_key, heads=heads, frames=frames, tokens=tokens,
        length=length, HEAD_DIM=head_dim, **numbers,
    )  # fmt: skip


def frame_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frames: int,
    softmax_scale: float,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, L, H, D) each, rows contiguous, L a positive multiple of ``frames``: out, and base-2 LSE (B, H, L)."""
    shape = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((shape[0], shape[2], shape[1]), dtype=torch.float32)
    settings = config, query.dtype, query.device, shape, frames, softmax_scale
    _prepare(*settings, query.stride(), key.stride(), value.stride())(query, key, value, out, lse)
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
    config: Configs = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, in two launches."""
    contiguous = torch.contiguous_format
    grad_query, grad_key, grad_value = (torch.empty_like(t, memory_format=contiguous) for t in (query, key, value))
    delta = torch.empty_like(lse)
    if config is not None and not isinstance(config, LaunchConfig):
        config = tuple(config)
    settings = config, query.dtype, query.device, query.shape, frames, softmax_scale
    strides = grad_out.stride(), query.stride(), key.stride(), value.stride()
    by_query, by_key = _prepare_backward(*settings, *strides)
    by_query(grad_out, query, key, value, out, lse, delta, grad_query)
    by_key(grad_out, query, key, value, lse, delta, grad_key, grad_value)
    return grad_query, grad_key, grad_value


def _entry(kernel: Any, config: LaunchConfig, dtype: str) -> dict[str, Any]:
    signature = {name: dtype for name in kernel.arg_names if name.endswith("_ptr")}
    signature |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32"}
    strides = [name for name in kernel.arg_names if name.endswith("_stride")]
    return static_entry(kernel, config, signature, divisible=strides, HEAD_DIM=64)


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    kernels = (
        frame_attention_forward_kernel,
        frame_attention_backward_query_kernel,
        frame_attention_backward_key_kernel,
    )
    entries = []
    for name, dtype in (("*bf16", torch.bfloat16), ("*fp32", torch.float32)):
        configs = [
            c for pass_ in ("forward", "backward") for c in select("frame_attention", pass_, dtype, arch, head_dim=64)
        ]
        entries += [_entry(kernel, config, name) for kernel, config in zip(kernels, configs, strict=True)]
    return entries
