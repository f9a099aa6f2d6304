"""Padded attention by online softmax, forward and backward; scores are recomputed, never stored.

B batch, Lq queries, Lk keys, H heads, D channels of a head. Statistics and accumulators in float32. The counter of the
dropout is the place of a probability, so tiles of any size draw the same mask (``reference.attention_dropout_mask``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.random import STREAM_ATTENTION
from sclkern.reference import attention_dropout_threshold

HEAD_DIMS = (32, 64, 128)
TILES = (128, 64, 32, 16)
DROPOUT_STREAM = tl.constexpr(STREAM_ATTENTION)
LOG2_E = tl.constexpr(1.4426950408889634)

# By bytes of an element. Largest tiles, as (rows of a program, rows it loops over), for D up to 64 and for 128: two
# bytes, what keeps the accumulators in registers; four bytes, IEEE products that run on the ordinary cores. Elements of
# scores and operands for each warp: more would spill. Not yet tuned on a GPU.
LARGEST_FORWARD = {2: ((128, 64), (128, 32)), 4: ((64, 32), (32, 32))}
LARGEST_BACKWARD = {2: ((64, 64), (64, 32)), 4: ((32, 32), (16, 32))}
FORWARD_PER_WARP, BACKWARD_PER_WARP = {2: 2048, 4: 512}, {2: 640, 4: 512}


@triton.jit
def load_rows(ptr, batch, head, row, inside, batch_stride, row_stride, head_stride, HEAD: tl.constexpr):
    """(rows, D) of one head; zero where ``inside`` (rows,) is False, whatever memory holds there."""
    channel = tl.arange(0, HEAD)[None, :]
    offset = batch * batch_stride + head * head_stride + row.to(tl.int64)[:, None] * row_stride + channel
    return tl.load(ptr + offset, mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(ptr, values, batch, head, row, length, heads, HEAD: tl.constexpr):
    """Into one head of a contiguous (B, length, H, D)."""
    offset = ((batch * length + row.to(tl.int64)[:, None]) * heads + head) * HEAD + tl.arange(0, HEAD)[None, :]
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=(row < length)[:, None])


@triton.jit
def existing_keys(mask_ptr, batch, column, keys):
    """(columns,) bool: inside the tensor and not padding."""
    valid = column < keys
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + batch * keys + column, mask=valid, other=0) != 0)
    return valid


@triton.jit
def kept(seed, batch_head, row, first_key, threshold, BLOCK_KEYS: tl.constexpr):
    """(rows, keys) bool: the probabilities that dropout keeps; four words serve eight neighbouring keys."""
    group = first_key // 8 + tl.arange(0, BLOCK_KEYS // 8)
    counter = (row[:, None] << 16) | group[None, :]
    zero = counter * 0
    word0, word1, word2, word3 = tl.philox(
        seed, counter, zero + batch_head, zero + DROPOUT_STREAM, zero, n_rounds=7
    )  # fmt: skip
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["heads", "queries", "keys", "threshold"])
def attention_forward_kernel(
    query_ptr,  # (B, Lq, H, D)
    key_ptr,  # (B, Lk, H, D)
    value_ptr,  # (B, Lk, H, D)
    mask_ptr,  # (B, Lk) bool, contiguous, or None
    seed_ptr,  # (1,) int64, or None without dropout
    out_ptr,  # (B, Lq, H, D), contiguous
    lse_ptr,  # (B, H, Lq) float32, base 2
    heads,
    queries,
    keys,
    query_batch_stride,
    query_row_stride,
    query_head_stride,
    key_batch_stride,
    key_row_stride,
    key_head_stride,
    value_batch_stride,
    value_row_stride,
    value_head_stride,
    scale,
    threshold,
    keep_scale,
    HEAD: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    # fmt: off
    query = load_rows(query_ptr, batch, head, row, row < queries,
                      query_batch_stride, query_row_stride, query_head_stride, HEAD)
    # fmt: on
    scale_2 = scale * LOG2_E
    highest = tl.full((BLOCK_QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    out = tl.zeros((BLOCK_QUERIES, HEAD), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(0, keys, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        valid = existing_keys(mask_ptr, batch, column, keys)
        key = load_rows(key_ptr, batch, head, column, valid, key_batch_stride, key_row_stride, key_head_stride, HEAD)
        # fmt: off
        value = load_rows(value_ptr, batch, head, column, valid,
                          value_batch_stride, value_row_stride, value_head_stride, HEAD)
        # fmt: on
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(valid[None, :], scores, -float("inf"))
        raised = tl.maximum(highest, tl.max(scores, 1) * scale_2)
        # A row that has met no valid key would compute -inf - -inf.
        pivot = tl.where(raised == -float("inf"), 0.0, raised)
        weights = tl.exp2(scores * scale_2 - pivot[:, None])
        correction = tl.exp2(highest - pivot)
        total = total * correction + tl.sum(weights, 1)
        if seed_ptr is not None:
            weights = tl.where(kept(seed, batch_head, row, start, threshold, BLOCK_KEYS), weights, 0.0)
        out = tl.dot(weights.to(value.dtype), value, out * correction[:, None], input_precision="ieee")
        highest = raised
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    out = out * (keep_scale / divisor)[:, None]
    lse = tl.where(empty, -float("inf"), highest + tl.log2(divisor))
    store_rows(out_ptr, out, batch, head, row, queries, heads, HEAD)
    tl.store(lse_ptr + batch_head.to(tl.int64) * queries + row, lse, mask=row < queries)


@triton.jit
def load_lse_2(lse_ptr, offset, inside):
    """Base-2 log-sum-exp; +inf for rows outside and rows without a key, so that their probabilities become zero."""
    lse = tl.load(lse_ptr + offset, mask=inside, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit(do_not_specialize=["heads", "queries", "keys", "threshold"])
def attention_backward_query_kernel(
    grad_out_ptr,  # (B, Lq, H, D)
    query_ptr,  # (B, Lq, H, D)
    key_ptr,  # (B, Lk, H, D)
    value_ptr,  # (B, Lk, H, D)
    mask_ptr,  # (B, Lk) bool, contiguous, or None
    seed_ptr,  # (1,) int64, or None without dropout
    out_ptr,  # (B, Lq, H, D), contiguous
    lse_ptr,  # (B, H, Lq) float32, base 2
    delta_ptr,  # (B, H, Lq) float32: rowsum(grad_out * out), written for the other kernel
    grad_query_ptr,  # (B, Lq, H, D), contiguous
    grad_key_ptr,  # (B, Lk, H, D), contiguous
    grad_value_ptr,  # (B, Lk, H, D), contiguous
    heads,
    queries,
    keys,
    grad_out_batch_stride,
    grad_out_row_stride,
    grad_out_head_stride,
    query_batch_stride,
    query_row_stride,
    query_head_stride,
    key_batch_stride,
    key_row_stride,
    key_head_stride,
    value_batch_stride,
    value_row_stride,
    value_head_stride,
    scale,
    threshold,
    keep_scale,
    HEAD: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ALONE: tl.constexpr,  # one tile holds all queries: keys and values get their gradients here as well
):
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    inside = row < queries
    # fmt: off
    query = load_rows(query_ptr, batch, head, row, inside,
                      query_batch_stride, query_row_stride, query_head_stride, HEAD)
    grad_out = load_rows(grad_out_ptr, batch, head, row, inside,
                         grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride, HEAD)
    out = load_rows(out_ptr, batch, head, row, inside, heads * HEAD * queries.to(tl.int64), heads * HEAD, HEAD, HEAD)
    # fmt: on
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    statistics = batch_head.to(tl.int64) * queries + row
    lse_2 = load_lse_2(lse_ptr, statistics, inside)
    if not ALONE:
        tl.store(delta_ptr + statistics, delta, mask=inside)
    grad_query = tl.zeros((BLOCK_QUERIES, HEAD), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(0, keys, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        valid = existing_keys(mask_ptr, batch, column, keys)
        key = load_rows(key_ptr, batch, head, column, valid, key_batch_stride, key_row_stride, key_head_stride, HEAD)
        # fmt: off
        value = load_rows(value_ptr, batch, head, column, valid,
                          value_batch_stride, value_row_stride, value_head_stride, HEAD)
        # fmt: on
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E) - lse_2[:, None]
        # Before the exponential: padding scores 0, and 2 to the power of 0 - lse can overflow.
        weights = tl.exp2(tl.where(valid[None, :], scores, -float("inf")))
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        used = weights
        if seed_ptr is not None:
            keep = kept(seed, batch_head, row, start, threshold, BLOCK_KEYS)
            used = tl.where(keep, weights, 0.0)
            grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        grad_scores = (weights * (grad_weights - delta[:, None])).to(key.dtype)
        grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
        if ALONE:
            grad_value = tl.dot(tl.trans(used.to(grad_out.dtype)), grad_out, input_precision="ieee") * keep_scale
            grad_key = tl.dot(tl.trans(grad_scores), query, input_precision="ieee") * scale
            store_rows(grad_value_ptr, grad_value, batch, head, column, keys, heads, HEAD)
            store_rows(grad_key_ptr, grad_key, batch, head, column, keys, heads, HEAD)
    store_rows(grad_query_ptr, grad_query * scale, batch, head, row, queries, heads, HEAD)


@triton.jit(do_not_specialize=["heads", "queries", "keys", "threshold"])
def attention_backward_key_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_value_ptr,
    heads,
    queries,
    keys,
    grad_out_batch_stride,
    grad_out_row_stride,
    grad_out_head_stride,
    query_batch_stride,
    query_row_stride,
    query_head_stride,
    key_batch_stride,
    key_row_stride,
    key_head_stride,
    value_batch_stride,
    value_row_stride,
    value_head_stride,
    scale,
    threshold,
    keep_scale,
    HEAD: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ALONE: tl.constexpr,  # one tile holds all keys: queries get their gradient here as well, and delta is not read
):
    # Scores are held as (keys, queries), so that the products that accumulate need no transposed probabilities.
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    first_key = tl.program_id(0) % tiles * BLOCK_KEYS
    column = first_key + tl.arange(0, BLOCK_KEYS)
    valid = existing_keys(mask_ptr, batch, column, keys)
    # fmt: off
    key = load_rows(key_ptr, batch, head, column, valid, key_batch_stride, key_row_stride, key_head_stride, HEAD)
    value = load_rows(value_ptr, batch, head, column, valid,
                      value_batch_stride, value_row_stride, value_head_stride, HEAD)
    # fmt: on
    grad_key = tl.zeros((BLOCK_KEYS, HEAD), tl.float32)
    grad_value = tl.zeros((BLOCK_KEYS, HEAD), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(0, queries, BLOCK_QUERIES):
        row = start + tl.arange(0, BLOCK_QUERIES)
        inside = row < queries
        # fmt: off
        query = load_rows(query_ptr, batch, head, row, inside,
                          query_batch_stride, query_row_stride, query_head_stride, HEAD)
        grad_out = load_rows(grad_out_ptr, batch, head, row, inside,
                             grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride, HEAD)
        # fmt: on
        statistics = batch_head.to(tl.int64) * queries + row
        lse_2 = load_lse_2(lse_ptr, statistics, inside)
        if ALONE:
            width = heads * HEAD
            out = load_rows(out_ptr, batch, head, row, inside, width * queries.to(tl.int64), width, HEAD, HEAD)
            delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2_E) - lse_2[None, :]
        weights = tl.exp2(tl.where(valid[:, None], scores, -float("inf")))
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        used = weights
        if seed_ptr is not None:
            keep = tl.trans(kept(seed, batch_head, row, first_key, threshold, BLOCK_KEYS))
            used = tl.where(keep, weights, 0.0)
            grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        grad_value = tl.dot(used.to(grad_out.dtype), grad_out, grad_value, input_precision="ieee")
        grad_scores = (weights * (grad_weights - delta[None, :])).to(query.dtype)
        grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
        if ALONE:
            grad_query = tl.dot(tl.trans(grad_scores), key, input_precision="ieee") * scale
            store_rows(grad_query_ptr, grad_query, batch, head, row, queries, heads, HEAD)
    store_rows(grad_key_ptr, grad_key * scale, batch, head, column, keys, heads, HEAD)
    store_rows(grad_value_ptr, grad_value * keep_scale, batch, head, column, keys, heads, HEAD)


def tile(length: int, largest: int) -> int:
    """The largest tile that pads ``length`` to at most 4/3 of what the smallest does: 65 takes 32, 325 takes 128."""
    length = max(length, 1)
    least = triton.cdiv(length, TILES[-1]) * TILES[-1]
    return next(t for t in TILES if t <= largest and 3 * triton.cdiv(length, t) * t <= 4 * least)


def tiles(rows: int, others: int, head: int, dtype: torch.dtype, largest: dict) -> tuple[int, int]:
    """Tile of the rows that are spread over programs, and of those that each program loops over."""
    limits = largest[dtype.itemsize][head == 128]
    return tile(rows, limits[0]), tile(others, limits[1])


def alone_tile(block: int) -> int:
    """Queries to a step of the key kernel where it writes their gradient too: half as many, or it would spill."""
    return max(TILES[-1], block // 2)


def warps(queries: int, keys: int, head: int, dtype: torch.dtype, per_warp: dict) -> int:
    """A power of two from 1 to 8 for tiles of these sizes."""
    count = (queries * keys + (queries + keys) * max(head, 64)) // per_warp[dtype.itemsize]
    return 1 << min(3, max(0, count.bit_length() - 1))


def _strides(**tensors: Tensor) -> dict[str, int]:
    places = (("batch", 0), ("row", 1), ("head", 2))
    return {f"{name}_{place}_stride": t.stride(i) for name, t in tensors.items() for place, i in places}


def _scalars(dropout_p: float, softmax_scale: float) -> dict[str, float]:
    threshold, keep_scale = attention_dropout_threshold(dropout_p)
    return {"scale": softmax_scale, "threshold": threshold, "keep_scale": keep_scale}


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    largest: dict = LARGEST_FORWARD,
) -> tuple[Tensor, Tensor]:
    """query (B, Lq, H, D), key and value (B, Lk, H, D), channels contiguous: out, and base-2 LSE (B, H, Lq)."""
    batch, queries, heads, head = query.shape
    keys = key.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device)
    block_queries, block_keys = tiles(queries, keys, head, query.dtype, largest)
    if lse.numel():
        attention_forward_kernel[(batch * heads * triton.cdiv(queries, block_queries),)](
            query_ptr=query,
            key_ptr=key,
            value_ptr=value,
            mask_ptr=mask,
            seed_ptr=seed,
            out_ptr=out,
            lse_ptr=lse,
            heads=heads,
            queries=queries,
            keys=keys,
            **_strides(query=query, key=key, value=value),
            **_scalars(dropout_p, softmax_scale),
            HEAD=head,
            BLOCK_QUERIES=block_queries,
            BLOCK_KEYS=block_keys,
            num_warps=warps(block_queries, block_keys, head, query.dtype, FORWARD_PER_WARP),
            enable_fp_fusion=True,
        )
    return out, lse


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    softmax_scale: float,
    largest: dict = LARGEST_BACKWARD,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; one launch where one tile holds all queries or all keys."""
    batch, queries, heads, head = query.shape
    keys = key.shape[1]
    grad_query, grad_key, grad_value = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)
    )
    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    arguments = {
        "grad_out_ptr": grad_out, "query_ptr": query, "key_ptr": key, "value_ptr": value, "mask_ptr": mask,
        "seed_ptr": seed, "out_ptr": out, "lse_ptr": lse, "delta_ptr": delta, "grad_query_ptr": grad_query,
        "grad_key_ptr": grad_key, "grad_value_ptr": grad_value, "heads": heads, "queries": queries, "keys": keys,
        **_strides(grad_out=grad_out, query=query, key=key, value=value), **_scalars(dropout_p, softmax_scale),
        "HEAD": head, "enable_fp_fusion": True,
    }  # fmt: skip

    def launch(kernel, length: int, block_queries: int, block_keys: int, block: int, alone: bool) -> None:
        if batch * heads * length:
            kernel[(batch * heads * triton.cdiv(length, block),)](
                **arguments,
                BLOCK_QUERIES=block_queries,
                BLOCK_KEYS=block_keys,
                ALONE=alone,
                num_warps=warps(block_queries, block_keys, head, query.dtype, BACKWARD_PER_WARP),
            )

    by_query = tiles(queries, keys, head, query.dtype, largest)
    by_key = tiles(keys, queries, head, query.dtype, largest)
    # A length of 0 has no kernel of its own to write the zeros of the other side, so it is never "alone".
    keys_alone = 0 < keys <= by_key[0] and queries > 0
    queries_alone = 0 < queries <= by_query[0] and keys > 0 and not keys_alone
    if not keys_alone:
        launch(attention_backward_query_kernel, queries, *by_query, by_query[0], queries_alone)
    if keys_alone:
        by_key = by_key[0], alone_tile(by_key[1])
    if not queries_alone:
        launch(attention_backward_key_kernel, keys, *reversed(by_key), by_key[0], keys_alone)
    return grad_query, grad_key, grad_value


def _entry(kernel, dtype: torch.dtype, queries: int, keys: int, head: int, alone: bool | None = None) -> dict:
    forward = kernel is attention_forward_kernel
    largest, per_warp = (
        (LARGEST_FORWARD, FORWARD_PER_WARP) if forward else (LARGEST_BACKWARD, BACKWARD_PER_WARP)
    )  # fmt: skip
    block_queries, block_keys = tiles(queries, keys, head, dtype, largest)
    if kernel is attention_backward_key_kernel:
        block_keys, block_queries = tiles(keys, queries, head, dtype, largest)
        block_queries = alone_tile(block_queries) if alone else block_queries
    name = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    tensors = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
    return {
        "kernel": kernel,
        "signature": {f"{tensor}_ptr": name for tensor in tensors}
        | {"mask_ptr": "*i1", "seed_ptr": "*i64", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
        | {"scale": "fp32", "keep_scale": "fp32"},
        "constants": {"HEAD": head, "BLOCK_QUERIES": block_queries, "BLOCK_KEYS": block_keys}
        | ({} if forward else {"ALONE": alone}),
        "num_warps": warps(block_queries, block_keys, head, dtype, per_warp),
        "divisible": [name for name in kernel.arg_names if name.endswith("_stride")],
    }


# What the static checks compile, at the real lengths: all with mask and dropout, which need the most registers.
AHEAD_OF_TIME = [
    _entry(kernel, dtype, queries, keys, head, alone)
    for dtype, head in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float32, 128))
    for kernel, queries, keys, alone in (
        (attention_forward_kernel, 325, 325, None),
        (attention_backward_query_kernel, 325, 325, False),
        (attention_backward_query_kernel, 13, 325, True),
        (attention_backward_key_kernel, 325, 325, False),
        (attention_backward_key_kernel, 325, 13, True),
    )
] + [
    _entry(attention_forward_kernel, torch.bfloat16, queries, keys, 64)
    for queries, keys in ((325, 13), (13, 325), (65, 65), (13, 13))
]
