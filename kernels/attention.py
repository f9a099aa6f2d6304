"""Attention by online softmax: what both directions share, and the forward. Scores are never stored.

One family for padded batches (B, L, H, D) and for packed sequences (T, H, D) bounded by ``cu_seqlens``, which is None
for a padded batch. B batch or number of sequences, Lq queries, Lk keys, H heads, D channels of a head, T rows of all
sequences together (B * L of a padded batch). Statistics and accumulators in float32. The counter of the dropout is the
place of a probability, so tiles of any size draw the same mask (``reference.attention_dropout_mask``).
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
# Integers that are another number for each batch: one compiled kernel serves them all.
LENGTHS = ["heads", "queries", "keys", "query_rows", "key_rows", "threshold"]

# By bytes of an element. Largest tiles, as (rows of a program, rows it loops over), for D up to 64 and for 128: two
# bytes, what keeps the accumulators in registers; four bytes, IEEE products that run on the ordinary cores. Elements of
# scores and operands for each warp: more would spill. Not yet tuned on a GPU.
LARGEST_FORWARD = {2: ((128, 64), (128, 32)), 4: ((64, 32), (32, 32))}
FORWARD_PER_WARP = {2: 2048, 4: 512}
# Rows of the first operand with which Hopper's tensor cores take a product whole (wgmma, by a group of four warps).
# Below: 65 x 65 in tiles of 32 and 13 x 13 in tiles of 16 use the older mma, one or two warps a program. Padding them
# to 64 rows would cost 1.8 and 16 times the work, and 16 x 16 scores leave most of four warps idle.
GROUP_ROWS, GROUP_WARPS = 64, 4


@triton.jit
def sequence(cu_seqlens_ptr, batch, length):
    """First row of a sequence, int64, and its length; ``length`` is that of each where the batch is padded."""
    if cu_seqlens_ptr is None:
        first = batch * length
    else:
        first = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + batch + 1) - first).to(tl.int32)
    return first, length


@triton.jit
def origin(ptr, cu_seqlens_ptr, batch, first, head, batch_stride, row_stride, head_stride):
    """Pointer to the first row of a sequence in one head."""
    if cu_seqlens_ptr is None:
        return ptr + (batch * batch_stride + head * head_stride)
    else:
        return ptr + (first * row_stride + head * head_stride)


@triton.jit
def load_rows(ptr, row, inside, row_stride, HEAD: tl.constexpr):
    """(rows, D); zero where ``inside`` (rows,) is False, whatever memory holds there."""
    offset = row.to(tl.int64)[:, None] * row_stride + tl.arange(0, HEAD)[None, :]
    return tl.load(ptr + offset, mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(ptr, values, first, row, length, head, heads, HEAD: tl.constexpr):
    """Into one head of a contiguous (T, H, D); ``row`` counts from ``first``."""
    offset = ((first + row.to(tl.int64)[:, None]) * heads + head) * HEAD + tl.arange(0, HEAD)[None, :]
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=(row < length)[:, None])


@triton.jit
def clear_rest(ptr, cu_seqlens_ptr, batch, rows, tile, tiles, head, heads, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros into the rows of one head that lie after the last sequence, by ``tiles`` programs."""
    end = tl.load(cu_seqlens_ptr + batch)
    for start in range(end + tile * BLOCK, rows, tiles * BLOCK):
        zeros = tl.zeros((BLOCK, HEAD), tl.float32)
        store_rows(ptr, zeros, batch * 0, start + tl.arange(0, BLOCK), rows, head, heads, HEAD)


@triton.jit
def clear_rest_of_lse(ptr, cu_seqlens_ptr, batch, rows, tile, tiles, head, BLOCK: tl.constexpr):
    """-inf, as of queries without keys, where ``clear_rest`` writes zeros."""
    end = tl.load(cu_seqlens_ptr + batch)
    for start in range(end + tile * BLOCK, rows, tiles * BLOCK):
        row = start + tl.arange(0, BLOCK)
        tl.store(ptr + head * rows + row, tl.full((BLOCK,), -float("inf"), tl.float32), mask=row < rows)


@triton.jit
def load_lse_2(lse_ptr, offset, inside):
    """Base-2 log-sum-exp; +inf for rows outside and rows without a key, so that their probabilities become zero."""
    lse = tl.load(lse_ptr + offset, mask=inside, other=float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit
def existing_keys(mask_ptr, batch, column, keys):
    """(columns,) bool: inside the sequence and not padding."""
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


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward_kernel(
    query_ptr,  # (B, Lq, H, D) or (T, H, D)
    key_ptr,  # (B, Lk, H, D) or (T, H, D)
    value_ptr,  # as key
    mask_ptr,  # (B, Lk) bool, contiguous, or None
    cu_seqlens_q_ptr,  # (B + 1,) int32, or None
    cu_seqlens_k_ptr,  # (B + 1,) int32, or None
    seed_ptr,  # (1,) int64, or None without dropout
    out_ptr,  # as query, contiguous
    lse_ptr,  # (H, T) float32, base 2
    heads,
    queries,  # Lq, of packed sequences the largest
    keys,
    query_rows,  # T of the queries
    key_rows,
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
    KEY_AXIS: tl.constexpr,  # 1: scores are (queries, keys); 0: all is transposed
):
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    if cu_seqlens_q_ptr is not None:  # noqa: SIM102, None has no operator
        if tl.program_id(0) + heads * tiles >= tl.num_programs(0):
            clear_rest(out_ptr, cu_seqlens_q_ptr, batch, query_rows, tile, tiles, head, heads, HEAD, BLOCK_QUERIES)
            clear_rest_of_lse(lse_ptr, cu_seqlens_q_ptr, batch, query_rows, tile, tiles, head, BLOCK_QUERIES)
            return
    first_query, queries = sequence(cu_seqlens_q_ptr, batch, queries)
    first_key, keys = sequence(cu_seqlens_k_ptr, batch, keys)
    if tile * BLOCK_QUERIES >= queries:
        return
    row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    # fmt: off
    query_ptr = origin(query_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                       query_batch_stride, query_row_stride, query_head_stride)
    key_ptr = origin(key_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                     key_batch_stride, key_row_stride, key_head_stride)
    value_ptr = origin(value_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                       value_batch_stride, value_row_stride, value_head_stride)
    # fmt: on
    query = load_rows(query_ptr, row, row < queries, query_row_stride, HEAD)
    scale_2 = scale * LOG2_E
    highest = tl.full((BLOCK_QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    out = tl.zeros((BLOCK_QUERIES, HEAD) if KEY_AXIS == 1 else (HEAD, BLOCK_QUERIES), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(0, keys, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        valid = existing_keys(mask_ptr, batch, column, keys)
        key = load_rows(key_ptr, column, valid, key_row_stride, HEAD)
        value = load_rows(value_ptr, column, valid, value_row_stride, HEAD)
        if KEY_AXIS == 1:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        else:
            scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        scores = tl.where(tl.expand_dims(valid, 1 - KEY_AXIS), scores, -float("inf"))
        raised = tl.maximum(highest, tl.max(scores, KEY_AXIS) * scale_2)
        # A row that has met no valid key would compute -inf - -inf.
        pivot = tl.where(raised == -float("inf"), 0.0, raised)
        weights = tl.exp2(scores * scale_2 - tl.expand_dims(pivot, KEY_AXIS))
        correction = tl.exp2(highest - pivot)
        total = total * correction + tl.sum(weights, KEY_AXIS)
        if seed_ptr is not None:
            keep = kept(seed, batch_head, row, start, threshold, BLOCK_KEYS)
            weights = tl.where(keep if KEY_AXIS == 1 else tl.trans(keep), weights, 0.0)
        out = out * tl.expand_dims(correction, KEY_AXIS)
        if KEY_AXIS == 1:
            out = tl.dot(weights.to(value.dtype), value, out, input_precision="ieee")
        else:
            out = tl.dot(tl.trans(value), weights.to(value.dtype), out, input_precision="ieee")
        highest = raised
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    out = out * tl.expand_dims(keep_scale / divisor, KEY_AXIS)
    lse = tl.where(empty, -float("inf"), highest + tl.log2(divisor))
    store_rows(out_ptr, out if KEY_AXIS == 1 else tl.trans(out), first_query, row, queries, head, heads, HEAD)
    tl.store(lse_ptr + head * query_rows + first_query + row, lse, mask=row < queries)


def tile(length: int, largest: int) -> int:
    """The largest tile that pads ``length`` to at most 4/3 of what the smallest does: 65 takes 32, 325 takes 128."""
    length = max(length, 1)
    least = triton.cdiv(length, TILES[-1]) * TILES[-1]
    return next(t for t in TILES if t <= largest and 3 * triton.cdiv(length, t) * t <= 4 * least)


def tiles(rows: int, others: int, head: int, dtype: torch.dtype, largest: dict) -> tuple[int, int]:
    """Tile of the rows that are spread over programs, and of those that each program loops over."""
    limits = largest[dtype.itemsize][head == 128]
    return tile(rows, limits[0]), tile(others, limits[1])


def warps(queries: int, keys: int, head: int, dtype: torch.dtype, per_warp: dict) -> int:
    """A power of two from 1 to 8 for tiles of these sizes."""
    count = (queries * keys + (queries + keys) * max(head, 64)) // per_warp[dtype.itemsize]
    least = GROUP_WARPS if dtype.itemsize == 2 and max(queries, keys) >= GROUP_ROWS else 1
    return max(least, 1 << min(3, max(0, count.bit_length() - 1)))


def forward_configuration(queries: int, keys: int, head: int, dtype: torch.dtype, largest: dict) -> dict[str, int]:
    block_queries, block_keys = tiles(queries, keys, head, dtype, largest)
    return {
        "HEAD": head,
        "BLOCK_QUERIES": block_queries,
        "BLOCK_KEYS": block_keys,
        # Few queries and many keys: the keys are the rows of the products, see GROUP_ROWS.
        "KEY_AXIS": 0 if block_queries < GROUP_ROWS <= block_keys else 1,
        "num_warps": warps(block_queries, block_keys, head, dtype, FORWARD_PER_WARP),
    }


Packing = tuple[Tensor, Tensor, int, int]
"""``cu_seqlens_q``, ``cu_seqlens_k`` and the largest lengths of packed sequences."""


def sizes(query: Tensor, key: Tensor, packing: Packing | None) -> tuple[int, int, int]:
    """Sequences that get programs, the largest number of queries, and of keys.

    Packed: one sequence more, whose programs clear the rows after the last; lengths of at least 1 give it some.
    """
    if packing is None:
        return query.shape[0], query.shape[1], key.shape[1]
    return packing[0].shape[0], max(packing[2], 1), max(packing[3], 1)


def arguments(packing: Packing | None, dropout_p: float, softmax_scale: float, **tensors: Tensor | None) -> dict:
    """Arguments that the three kernels share, except the constants; pointers are named after ``tensors``."""
    query, key = tensors["query"], tensors["key"]
    threshold, keep_scale = attention_dropout_threshold(dropout_p)
    _, queries, keys = sizes(query, key, packing)
    strides = {}
    for name in ("query", "key", "value", *(["grad_out"] if "grad_out" in tensors else [])):
        *batch, row, head, _ = tensors[name].stride()
        # One int for all packed sequences: the kernel does not read it.
        strides |= {f"{name}_batch_stride": batch[0] if batch else 0}
        strides |= {f"{name}_row_stride": row, f"{name}_head_stride": head}
    return {f"{name}_ptr": tensor for name, tensor in tensors.items()} | {
        "cu_seqlens_q_ptr": packing[0] if packing else None,
        "cu_seqlens_k_ptr": packing[1] if packing else None,
        "heads": query.shape[-2],
        "queries": queries,
        "keys": keys,
        "query_rows": query.shape[:-2].numel(),
        "key_rows": key.shape[:-2].numel(),
        **strides,
        "scale": softmax_scale,
        "threshold": threshold,
        "keep_scale": keep_scale,
        "enable_fp_fusion": True,
    }


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    packing: Packing | None = None,
    largest: dict = LARGEST_FORWARD,
) -> tuple[Tensor, Tensor]:
    """query (B, Lq, H, D), key and value (B, Lk, H, D), packed (T, H, D), channels contiguous: out, and the base-2
    log-sum-exp (H, T) of the queries."""
    heads, head = query.shape[-2:]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((heads, query.shape[:-2].numel()), dtype=torch.float32, device=query.device)
    batch, queries, keys = sizes(query, key, packing)
    configuration = forward_configuration(queries, keys, head, query.dtype, largest)
    programs = batch * heads * triton.cdiv(queries, configuration["BLOCK_QUERIES"])
    if programs:
        tensors = {"query": query, "key": key, "value": value, "mask": mask, "seed": seed, "out": out, "lse": lse}
        shared = arguments(packing, dropout_p, softmax_scale, **tensors)
        attention_forward_kernel[(programs,)](**shared, **configuration)
    return out, lse


def entry(kernel, dtype: torch.dtype, configuration: dict[str, int], packed: bool = False) -> dict:
    """What the static checks compile: with dropout, and with a mask where padded, which needs the most registers."""
    name = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    tensors = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
    absent = ("mask_ptr",) if packed else ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr")
    return {
        "kernel": kernel,
        "signature": {f"{tensor}_ptr": name for tensor in tensors}
        | {"mask_ptr": "*i1", "cu_seqlens_q_ptr": "*i32", "cu_seqlens_k_ptr": "*i32", "seed_ptr": "*i64"}
        | {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32", "keep_scale": "fp32"},
        "constants": {key: value for key, value in configuration.items() if key != "num_warps"} | dict.fromkeys(absent),
        "num_warps": configuration["num_warps"],
        "divisible": [name for name in kernel.arg_names if name.endswith("_stride")],
    }


def _forward_entry(queries: int, keys: int, head: int, dtype: torch.dtype, packed: bool = False) -> dict:
    configuration = forward_configuration(queries, keys, head, dtype, LARGEST_FORWARD)
    return entry(attention_forward_kernel, dtype, configuration, packed)


AHEAD_OF_TIME = [
    *(
        _forward_entry(queries, keys, 64, torch.bfloat16)
        for queries, keys in ((325, 325), (325, 13), (13, 325), (65, 65), (13, 13))
    ),
    *(_forward_entry(queries, keys, 64, torch.bfloat16, packed=True) for queries, keys in ((325, 325), (13, 325))),
    _forward_entry(325, 325, 128, torch.bfloat16),
    _forward_entry(325, 325, 64, torch.float32),
]
