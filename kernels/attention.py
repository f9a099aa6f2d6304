"""Attention by online softmax: what both directions share, and the forward. Scores are never stored.

One family for padded batches (B, L, H, D) and for packed sequences (T, H, D) bounded by ``cu_seqlens``, which is None
for a padded batch. B batch or number of sequences, Lq queries, Lk keys, H heads, D head_dim, T rows of all sequences
together (B * L of a padded batch). Statistics and accumulators in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.attention_dropout import attention_dropout
from sclkern.kernels.attention_statistics import keep_bits, rows_with_bits
from sclkern.kernels.config import Features, LaunchConfig, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div, next_power_of_2
from sclkern.kernels.dropout import dropout_keep_mask, load_keep_mask, sequence_head
from sclkern.kernels.launch import Prepared, static_entry
from sclkern.reference import attention_dropout_threshold

LOG2_E = tl.constexpr(1.4426950408889634)
block_of = triton.constexpr_function(next_power_of_2)
# Integers that differ from batch to batch: one compiled kernel serves them all.
DYNAMIC_ARGS = ["heads", "queries", "keys", "query_rows", "key_rows", "threshold"]
BIAS_STRIDES = ("bias_batch_stride", "bias_head_stride", "bias_row_stride", "bias_column_stride")


@triton.jit
def sequence_bounds(cu_seqlens_ptr, batch, length):
    """First row of a sequence, int64, and its length; of a padded batch ``length`` itself."""
    if cu_seqlens_ptr is None:
        first = batch * length
    else:
        first = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + batch + 1) - first).to(tl.int32)
    return first, length


@triton.jit
def sequence_ptr(
    ptr, cu_seqlens_ptr, batch, first, head, batch_stride, row_stride, head_stride, HEAD_DIM: tl.constexpr
):
    """Pointer to the first row of a sequence in one head."""
    start = batch * batch_stride if cu_seqlens_ptr is None else first * row_stride
    offset = start + head * head_stride
    if HEAD_DIM % 16 != 0:
        # Triton knows of integers whether 16 divides them; ``contiguous_channels`` sees to it that 8 does.
        offset = tl.multiple_of(offset, 8)
    return ptr + offset


@triton.jit
def tile_mask(inside, HEAD_DIM: tl.constexpr):
    """(rows, D or 1): rows that are ``inside`` (rows,), without the channels that fill the tile."""
    mask = inside[:, None]
    if block_of(HEAD_DIM) != HEAD_DIM:
        mask = mask & (tl.arange(0, block_of(HEAD_DIM)) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_rows(ptr, row, inside, row_stride, HEAD_DIM: tl.constexpr):
    """(rows, D), D filled up to a power of two; zero there and where ``inside`` (rows,) is False, whatever memory
    holds."""
    offset = row.to(tl.int64)[:, None] * row_stride + tl.arange(0, block_of(HEAD_DIM))[None, :]
    return tl.load(ptr + offset, mask=tile_mask(inside, HEAD_DIM), other=0.0)


@triton.jit
def store_rows(ptr, values, first, row, length, head, heads, HEAD_DIM: tl.constexpr):
    """Store (rows, D) into one head of a contiguous (T, H, D); ``row`` counts from ``first``."""
    channel = tl.arange(0, block_of(HEAD_DIM))
    offset = ((first + row.to(tl.int64)[:, None]) * heads + head) * HEAD_DIM + channel[None, :]
    tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask=tile_mask(row < length, HEAD_DIM))


@triton.jit
def zero_tail(ptr, cu_seqlens_ptr, batch, rows, tile, tiles, head, heads, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write zeros into the rows of one head that lie after the last sequence, by ``tiles`` programs."""
    end = tl.load(cu_seqlens_ptr + batch)
    for start in range(end + tile * BLOCK, rows, tiles * BLOCK):
        zeros = tl.zeros((BLOCK, block_of(HEAD_DIM)), tl.float32)
        store_rows(ptr, zeros, batch * 0, start + tl.arange(0, BLOCK), rows, head, heads, HEAD_DIM)


@triton.jit
def empty_tail_lse(ptr, cu_seqlens_ptr, batch, rows, tile, tiles, head, BLOCK: tl.constexpr):
    """Write -inf, as for queries without keys, where ``zero_tail`` writes zeros."""
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
def key_mask(mask_ptr, batch, column, keys):
    """(columns,) bool: inside the sequence and not padding."""
    valid = column < keys
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + batch * keys + column, mask=valid, other=0) != 0)
    return valid


@triton.jit
def load_bias(ptr, row, column, valid, queries, row_stride, column_stride, scale, TRANSPOSED: tl.constexpr):
    """What the product of query and key begins with: the bias of one head over the scale of the scores, float32, as
    scores lie. Zero where ``valid`` is False, whatever memory holds there.

    Added to the finished product it would be laid out anew with the scores, for twice the instructions.
    """
    KEY_AXIS: tl.constexpr = 0 if TRANSPOSED else 1  # of the scores
    # Rows after the last, of which nothing is kept, read that one: cheaper than a mask of each place.
    rows = ptr + tl.minimum(row, queries - 1).to(tl.int64) * row_stride
    columns = column.to(tl.int64) * column_stride
    places = tl.expand_dims(rows, KEY_AXIS) + tl.expand_dims(columns, 1 - KEY_AXIS)
    return tl.load(places, mask=tl.expand_dims(valid, 1 - KEY_AXIS), other=0.0).to(tl.float32) * (1.0 / scale)


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
def attention_forward_kernel(
    query_ptr,  # (B, Lq, H, D) or (T, H, D)
    key_ptr,  # (B, Lk, H, D) or (T, H, D)
    value_ptr,  # as key
    mask_ptr,  # (B, Lk) bool, contiguous, or None
    bias_ptr,  # (B or 1, H or 1, Lq, Lk), any strides, or None
    cu_seqlens_q_ptr,  # (B + 1,) int32, or None
    cu_seqlens_k_ptr,  # (B + 1,) int32, or None
    seed_ptr,  # (1,) int64, or None without dropout
    ids_ptr,  # (B,) int64, which key the dropout mask in place of the index, or None
    bits_ptr,  # (H, T, words of 32 keys) int32: the dropout mask if it was drawn before, or None
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
    bias_batch_stride,  # 0 for one sample, None without a bias
    bias_head_stride,
    bias_row_stride,
    bias_column_stride,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # scores are (keys, queries)
):
    KEY_AXIS: tl.constexpr = 0 if TRANSPOSED else 1  # of the scores
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    if cu_seqlens_q_ptr is not None:  # noqa: SIM102, None has no operator
        if tl.program_id(0) + heads * tiles >= tl.num_programs(0):
            zero_tail(out_ptr, cu_seqlens_q_ptr, batch, query_rows, tile, tiles, head, heads, HEAD_DIM, BLOCK_QUERIES)
            empty_tail_lse(lse_ptr, cu_seqlens_q_ptr, batch, query_rows, tile, tiles, head, BLOCK_QUERIES)
            return
    words = tl.cdiv(keys, 32)
    first_query, queries = sequence_bounds(cu_seqlens_q_ptr, batch, queries)
    first_key, keys = sequence_bounds(cu_seqlens_k_ptr, batch, keys)
    if tile * BLOCK_QUERIES >= queries:
        return
    row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    # fmt: off
    query_ptr = sequence_ptr(query_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                             query_batch_stride, query_row_stride, query_head_stride, HEAD_DIM)
    key_ptr = sequence_ptr(key_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                           key_batch_stride, key_row_stride, key_head_stride, HEAD_DIM)
    value_ptr = sequence_ptr(value_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                             value_batch_stride, value_row_stride, value_head_stride, HEAD_DIM)
    # fmt: on
    if bias_ptr is not None:
        bias_ptr += batch * bias_batch_stride + head * bias_head_stride
    query = load_rows(query_ptr, row, row < queries, query_row_stride, HEAD_DIM)
    scale_2 = scale * LOG2_E
    m_i = tl.full((BLOCK_QUERIES,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK_QUERIES,), tl.float32)
    CHANNELS: tl.constexpr = block_of(HEAD_DIM)
    out = tl.zeros((CHANNELS, BLOCK_QUERIES) if TRANSPOSED else (BLOCK_QUERIES, CHANNELS), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        if ids_ptr is not None:
            batch_head = sequence_head(ids_ptr, batch, head, heads)
    for start in range(0, keys, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        valid = key_mask(mask_ptr, batch, column, keys)
        key = load_rows(key_ptr, column, valid, key_row_stride, HEAD_DIM)
        value = load_rows(value_ptr, column, valid, value_row_stride, HEAD_DIM)
        bias = None
        if bias_ptr is not None:
            bias = load_bias(
                bias_ptr, row, column, valid, queries, bias_row_stride, bias_column_stride, scale, TRANSPOSED
            )
        if not TRANSPOSED:
            scores = tl.dot(query, tl.trans(key), bias, input_precision="ieee")
        else:
            scores = tl.dot(key, tl.trans(query), bias, input_precision="ieee")
        scores = tl.where(tl.expand_dims(valid, 1 - KEY_AXIS), scores, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(scores, KEY_AXIS) * scale_2)
        # A row that has met no valid key would compute -inf - -inf.
        pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(scores * scale_2 - tl.expand_dims(pivot, KEY_AXIS))
        alpha = tl.exp2(m_i - pivot)
        l_i = l_i * alpha + tl.sum(p, KEY_AXIS)
        if seed_ptr is not None:
            group = start // 8 + tl.arange(0, BLOCK_KEYS // 8)
            if bits_ptr is not None:
                stats = head * query_rows + first_query + row
                keep = load_keep_mask(bits_ptr, stats, row < queries, start, words, BLOCK_KEYS, TRANSPOSED)
            else:
                keep = dropout_keep_mask(seed, batch_head, row[:, None], group[None, :], threshold)
                if TRANSPOSED:
                    keep = tl.trans(keep)
            p = tl.where(keep, p, 0.0)
        out = out * tl.expand_dims(alpha, KEY_AXIS)
        if not TRANSPOSED:
            out = tl.dot(p.to(value.dtype), value, out, input_precision="ieee")
        else:
            out = tl.dot(tl.trans(value), p.to(value.dtype), out, input_precision="ieee")
        m_i = m_new
    empty = l_i == 0.0
    divisor = tl.where(empty, 1.0, l_i)
    out = out * tl.expand_dims(keep_scale / divisor, KEY_AXIS)
    lse = tl.where(empty, -float("inf"), m_i + tl.log2(divisor))
    store_rows(out_ptr, tl.trans(out) if TRANSPOSED else out, first_query, row, queries, head, heads, HEAD_DIM)
    tl.store(lse_ptr + head * query_rows + first_query + row, lse, mask=row < queries)


Packing = tuple[Tensor, Tensor, int, int]
"""``cu_seqlens_q``, ``cu_seqlens_k`` and the largest lengths of packed sequences."""


# Numbers of sequences + 1 and the largest lengths of packed sequences, None for a padded batch.
Bounds = tuple[int, int, int] | None


def bounds(packing: Packing | None) -> Bounds:
    """What launches depend on of packed sequences."""
    return None if packing is None else (packing[0].shape[0], packing[2], packing[3])


def sizes(query: torch.Size, key: torch.Size, packed: Bounds) -> tuple[int, int, int]:
    """Sequences that get programs, the largest number of queries, and of keys, from shapes.

    Packed: one sequence more, whose programs clear the rows after the last; lengths of at least 1 give it some.
    """
    if packed is None:
        return query[0], query[1], key[1]
    return packed[0], max(packed[1], 1), max(packed[2], 1)


Strides = tuple[int, ...] | None
"""Of a bias by batch, head, row and column; None without one."""


def bias_strides(bias: Tensor | None) -> Strides:
    """What the kernels add to reach a place of (B or 1, H or 1, Lq, Lk)."""
    if bias is None:
        return None
    batch, head, row, column = bias.stride()
    return batch if bias.shape[0] > 1 else 0, head if bias.shape[1] > 1 else 0, row, column


def arguments(
    query: torch.Size, key: torch.Size, packed: Bounds, dropout_p: float, softmax_scale: float,
    strides: Sequence[tuple[str, tuple[int, ...]]], bias: Strides = None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments that the three kernels share, except tensors and the constants of a configuration, from shapes."""
    threshold, keep_scale = attention_dropout_threshold(dropout_p)
    _, queries, keys = sizes(query, key, packed)
    numbers: dict[str, Any] = {
        "heads": query[-2],
        "queries": queries,
        "keys": keys,
        "query_rows": math.prod(query[:-2]),
        "key_rows": math.prod(key[:-2]),
        "scale": softmax_scale,
        "threshold": threshold,
        "keep_scale": keep_scale,
        "HEAD_DIM": query[-1],
    }
    for name, (*batch, row, head, _) in strides:
        # One int for all packed sequences: the kernel does not read it.
        numbers |= {f"{name}_batch_stride": batch[0] if batch else 0}
        numbers |= {f"{name}_row_stride": row, f"{name}_head_stride": head}
    return numbers | dict(zip(BIAS_STRIDES, bias or (None,) * len(BIAS_STRIDES), strict=True))


@settled
def _prepare(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, query: torch.Size, key: torch.Size,
    packed: Bounds, dropout_p: float, softmax_scale: float, query_strides: tuple[int, ...],
    key_strides: tuple[int, ...], value_strides: tuple[int, ...], bias: Strides,
) -> Prepared:  # fmt: skip
    batch, queries, keys = sizes(query, key, packed)
    shapes = {"queries": queries, "keys": keys, "head_dim": query[-1]} | ({} if bias is None else {"bias": 1})
    (chosen,) = resolve(config, ("attention_forward_kernel",), Features(dtype, device), **shapes)
    programs = batch * query[-2] * ceil_div(queries, chosen["BLOCK_QUERIES"])
    strides = ("query", query_strides), ("key", key_strides), ("value", value_strides)
    numbers = arguments(query, key, packed, dropout_p, softmax_scale, strides, bias)
    return Prepared(attention_forward_kernel, (programs,), chosen, **numbers)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    packing: Packing | None = None,
    dropout_ids: Tensor | None = None,
    bias: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """query (B, Lq, H, D), key and value (B, Lk, H, D), packed (T, H, D), channels contiguous, dropout_ids (B,)
    contiguous, bias (B or 1, H or 1, Lq, Lk) of a padded batch, any strides: out, and the statistics of
    ``attention_statistics``, base-2 log-sum-exps (H, T) first."""
    shape = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    numbers = bounds(packing), dropout_p, softmax_scale
    launch = _prepare(
        config, query.dtype, query.device, shape, key.shape, *numbers, query.stride(), key.stride(),
        value.stride(), bias_strides(bias),
    )  # fmt: skip
    cu_seqlens_q, cu_seqlens_k = packing[:2] if packing else (None, None)
    rows, drawn = shape[-2], launch.config["KEEP_BITS"] and seed is not None
    if drawn:
        count, *lengths = sizes(shape, key.shape, bounds(packing))
        rows = rows_with_bits(rows, lengths[1])
    lse = query.new_empty((rows, math.prod(shape[:-2])), dtype=torch.float32)
    bits = keep_bits(lse, shape[-2], torch.uint8)
    if bits is not None and seed is not None and lse.numel():
        # Of packed sequences the last has no rows.
        counts = (count - (packing is not None), shape[-2], *lengths)
        like = Features(query.dtype, query.device)
        attention_dropout(bits, cu_seqlens_q, cu_seqlens_k, seed, dropout_ids, counts, dropout_p, like)
    bits = keep_bits(lse, shape[-2], torch.int32)
    launch(query, key, value, mask, bias, cu_seqlens_q, cu_seqlens_k, seed, dropout_ids, bits, out, lse)
    return out, lse


def entry(
    kernel: Any, config: LaunchConfig, dtype: torch.dtype, head_dim: int, packed: bool = False, bias: bool = False
) -> dict[str, Any]:
    """What the static checks compile: with dropout keyed by ids, as training has it, and with a mask where
    padded, which needs the most registers; a bias is of the dtype of the features, its rows contiguous."""
    name = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    tensors = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
    absent = ("mask_ptr",) if packed else ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr")
    signature = {f"{tensor}_ptr": name for tensor in tensors}
    signature |= {"mask_ptr": "*i1", "cu_seqlens_q_ptr": "*i32", "cu_seqlens_k_ptr": "*i32"}
    signature |= {"seed_ptr": "*i64", "ids_ptr": "*i64"}
    signature |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32", "keep_scale": "fp32"}
    strides = [arg for arg in kernel.arg_names if arg.endswith("_stride") and arg not in BIAS_STRIDES]
    if head_dim % 16:
        strides = [arg for arg in strides if not arg.endswith("_head_stride")]
    constants: dict[str, Any] = {"HEAD_DIM": head_dim, **{arg: None for arg in absent if arg in kernel.arg_names}}
    if bias:
        signature |= {"bias_ptr": name, "grad_bias_ptr": name} | dict.fromkeys(BIAS_STRIDES[:-1], "i32")
        constants[BIAS_STRIDES[-1]] = 1
    return static_entry(kernel, config, signature, divisible=strides, **constants)


# (queries, keys, head_dim, dtype, packed) of what the static checks compile.
STATIC_SHAPES = [
    *((*lengths, 64, torch.bfloat16, False) for lengths in ((325, 325), (325, 13), (13, 325), (65, 65), (13, 13))),
    *((*lengths, 64, torch.bfloat16, True) for lengths in ((325, 325), (13, 325))),
    (325, 325, 128, torch.bfloat16, False),
    # SigLIP so400m at 384 px.
    (729, 729, 72, torch.bfloat16, False),
    (325, 325, 64, torch.float32, False),
]
# (queries, keys, head_dim, dtype) of those with a bias.
BIASED_SHAPES = [
    *((*lengths, 64, torch.bfloat16) for lengths in ((325, 325), (325, 13), (13, 325), (13, 13))),
    (49, 49, 32, torch.bfloat16),
    (729, 729, 72, torch.bfloat16),
    (325, 325, 64, torch.float32),
]


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    entries = []
    for queries, keys, head_dim, dtype, packed in STATIC_SHAPES:
        (config,) = select("attention", "forward", dtype, arch, queries=queries, keys=keys, head_dim=head_dim)
        entries.append(entry(attention_forward_kernel, config, dtype, head_dim, packed))
    for queries, keys, head_dim, dtype in BIASED_SHAPES:
        (config,) = select("attention", "forward", dtype, arch, queries=queries, keys=keys, head_dim=head_dim, bias=1)
        entries.append(entry(attention_forward_kernel, config, dtype, head_dim, bias=True))
    return entries
