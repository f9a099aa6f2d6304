"""The backward of attention: probabilities are computed again from the log-sum-exp; no atomics, so results repeat.

Two launches, one by queries and one by keys; a single one where one tile holds all queries or all keys
(``SINGLE_TILE``), which then writes the gradients of the other side directly. Dimensions and ``cu_seqlens`` as in
``attention``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.attention import (
    BIASED_SHAPES,
    LOG2_E,
    Bounds,
    Packing,
    Strides,
    arguments,
    bias_strides,
    block_of,
    bounds,
    entry,
    key_mask,
    load_bias,
    load_lse_2,
    load_rows,
    sequence_bounds,
    sequence_ptr,
    sizes,
    store_rows,
    zero_tail,
)
from sclkern.kernels.attention import (
    DYNAMIC_ARGS as FORWARD_ARGS,
)
from sclkern.kernels.attention_statistics import keep_bits
from sclkern.kernels.config import Configs, Features, LaunchConfig, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.dropout import dropout_keep_mask, load_keep_mask, sequence_head
from sclkern.kernels.launch import Prepared

DYNAMIC_ARGS = [*FORWARD_ARGS, "grad_query_heads", "grad_key_heads"]


@triton.jit
def score_gradients(
    query, key, value, bias, grad_out, lse_2, delta, valid, seed, bits_ptr, words, stats, inside, batch_head, row,
    first_key, scale, threshold, keep_scale, DROPOUT: tl.constexpr, BLOCK_KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Probabilities after dropout and the gradient of the scores, float32; ``bias`` is of ``load_bias``, or None.

    (queries, keys), or (keys, queries) where ``TRANSPOSED``.
    """
    KEY_AXIS: tl.constexpr = 0 if TRANSPOSED else 1  # of the scores
    if not TRANSPOSED:
        scores = tl.dot(query, tl.trans(key), bias, input_precision="ieee")
        grad_p = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
    else:
        scores = tl.dot(key, tl.trans(query), bias, input_precision="ieee")
        grad_p = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
    scores = scores * (scale * LOG2_E) - tl.expand_dims(lse_2, KEY_AXIS)
    # Before the exponential: padding scores 0, and 2 to the power of 0 - lse can overflow.
    p = tl.exp2(tl.where(tl.expand_dims(valid, 1 - KEY_AXIS), scores, -float("inf")))
    p_dropped = p
    if DROPOUT:
        if bits_ptr is not None:
            keep = load_keep_mask(bits_ptr, stats, inside, first_key, words, BLOCK_KEYS, TRANSPOSED)
        else:
            group = first_key // 8 + tl.arange(0, BLOCK_KEYS // 8)
            keep = dropout_keep_mask(seed, batch_head, row[:, None], group[None, :], threshold)
            if TRANSPOSED:
                keep = tl.trans(keep)
        p_dropped = tl.where(keep, p, 0.0)
        grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
    return p_dropped, p * (grad_p - tl.expand_dims(delta, KEY_AXIS))


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
def attention_backward_query_kernel(
    grad_out_ptr,  # (B, Lq, H, D) or (T, H, D)
    query_ptr,  # as grad_out
    key_ptr,  # (B, Lk, H, D) or (T, H, D)
    value_ptr,  # as key
    mask_ptr,  # (B, Lk) bool, contiguous, or None
    bias_ptr,  # (B or 1, H or 1, Lq, Lk), any strides, or None
    cu_seqlens_q_ptr,  # (B + 1,) int32, or None
    cu_seqlens_k_ptr,  # (B + 1,) int32, or None
    seed_ptr,  # (1,) int64, or None without dropout
    ids_ptr,  # (B,) int64, which key the dropout mask in place of the index, or None
    bits_ptr,  # (H, T, words of 32 keys) int32: the dropout mask if it was drawn before the forward, or None
    out_ptr,  # as query, contiguous
    lse_ptr,  # (H, T) float32, base 2
    delta_ptr,  # (H, T) float32: rowsum(grad_out * out), written for the other kernel
    grad_query_ptr,  # as query, contiguous
    grad_key_ptr,  # as key, contiguous
    grad_value_ptr,  # as key, contiguous
    heads,
    grad_query_heads,  # heads of the tensor in which grad_query lies
    grad_key_heads,  # heads of that in which grad_key and grad_value lie
    queries,  # Lq, of packed sequences the largest
    keys,
    query_rows,  # T of the queries
    key_rows,
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
    SINGLE_TILE: tl.constexpr,  # one tile holds all queries: keys and values get their gradients here as well
    TRANSPOSED: tl.constexpr,  # scores are (keys, queries)
):
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    # fmt: off
    if cu_seqlens_q_ptr is not None:  # noqa: SIM102, None has no operator
        if tl.program_id(0) + heads * tiles >= tl.num_programs(0):
            zero_tail(grad_query_ptr, cu_seqlens_q_ptr, batch, query_rows, tile, tiles, head, grad_query_heads,
                      HEAD_DIM, BLOCK_QUERIES)
            if SINGLE_TILE:
                zero_tail(grad_key_ptr, cu_seqlens_k_ptr, batch, key_rows, tile, tiles, head, grad_key_heads,
                          HEAD_DIM, BLOCK_KEYS)
                zero_tail(grad_value_ptr, cu_seqlens_k_ptr, batch, key_rows, tile, tiles, head, grad_key_heads,
                          HEAD_DIM, BLOCK_KEYS)
            return
    words = tl.cdiv(keys, 32)
    first_query, queries = sequence_bounds(cu_seqlens_q_ptr, batch, queries)
    first_key, keys = sequence_bounds(cu_seqlens_k_ptr, batch, keys)
    # The first tile stays: as a single tile it owes zeros to the other side of an empty sequence.
    if tile * BLOCK_QUERIES >= tl.maximum(queries, 1):
        return
    row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    inside = row < queries
    query_ptr = sequence_ptr(query_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                             query_batch_stride, query_row_stride, query_head_stride, HEAD_DIM)
    grad_out_ptr = sequence_ptr(grad_out_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                                grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride, HEAD_DIM)
    key_ptr = sequence_ptr(key_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                           key_batch_stride, key_row_stride, key_head_stride, HEAD_DIM)
    value_ptr = sequence_ptr(value_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                             value_batch_stride, value_row_stride, value_head_stride, HEAD_DIM)
    # fmt: on
    if bias_ptr is not None:
        bias_ptr += batch * bias_batch_stride + head * bias_head_stride
    query = load_rows(query_ptr, row, inside, query_row_stride, HEAD_DIM)
    grad_out = load_rows(grad_out_ptr, row, inside, grad_out_row_stride, HEAD_DIM)
    out = load_rows(out_ptr + (first_query * heads + head) * HEAD_DIM, row, inside, heads * HEAD_DIM, HEAD_DIM)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    stats = head * query_rows + first_query + row
    lse_2 = load_lse_2(lse_ptr, stats, inside)
    if not SINGLE_TILE:
        tl.store(delta_ptr + stats, delta, mask=inside)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    if ids_ptr is not None:
        batch_head = sequence_head(ids_ptr, batch, head, heads)
    CHANNELS: tl.constexpr = block_of(HEAD_DIM)
    grad_query = tl.zeros((CHANNELS, BLOCK_QUERIES) if TRANSPOSED else (BLOCK_QUERIES, CHANNELS), tl.float32)
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
        p_dropped, grad_scores = score_gradients(
            query, key, value, bias, grad_out, lse_2, delta, valid, seed, bits_ptr, words, stats, inside, batch_head,
            row, start, scale, threshold, keep_scale, seed_ptr is not None, BLOCK_KEYS, TRANSPOSED,
        )  # fmt: skip
        p_dropped, grad_scores = p_dropped.to(grad_out.dtype), grad_scores.to(query.dtype)
        if not TRANSPOSED:
            grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
        else:
            grad_query = tl.dot(tl.trans(key), grad_scores, grad_query, input_precision="ieee")
        if SINGLE_TILE:
            if not TRANSPOSED:
                p_dropped, grad_scores = tl.trans(p_dropped), tl.trans(grad_scores)
            grad_value = tl.dot(p_dropped, grad_out, input_precision="ieee") * keep_scale
            grad_key = tl.dot(grad_scores, query, input_precision="ieee") * scale
            store_rows(grad_value_ptr, grad_value, first_key, column, keys, head, grad_key_heads, HEAD_DIM)
            store_rows(grad_key_ptr, grad_key, first_key, column, keys, head, grad_key_heads, HEAD_DIM)
    grad_query = tl.trans(grad_query) if TRANSPOSED else grad_query
    store_rows(grad_query_ptr, grad_query * scale, first_query, row, queries, head, grad_query_heads, HEAD_DIM)


@triton.jit(do_not_specialize=DYNAMIC_ARGS)
def attention_backward_key_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, mask_ptr, bias_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    seed_ptr, ids_ptr, bits_ptr, out_ptr, lse_ptr, delta_ptr, grad_query_ptr, grad_key_ptr, grad_value_ptr,
    heads, grad_query_heads, grad_key_heads, queries, keys, query_rows, key_rows,
    grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    bias_batch_stride, bias_head_stride, bias_row_stride, bias_column_stride,
    scale, threshold, keep_scale, HEAD_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    SINGLE_TILE: tl.constexpr,  # one tile holds all keys: queries get their gradient here too, and delta is not read
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    # fmt: off
    if cu_seqlens_k_ptr is not None:  # noqa: SIM102, None has no operator
        if tl.program_id(0) + heads * tiles >= tl.num_programs(0):
            zero_tail(grad_key_ptr, cu_seqlens_k_ptr, batch, key_rows, tile, tiles, head, grad_key_heads,
                      HEAD_DIM, BLOCK_KEYS)
            zero_tail(grad_value_ptr, cu_seqlens_k_ptr, batch, key_rows, tile, tiles, head, grad_key_heads,
                      HEAD_DIM, BLOCK_KEYS)
            if SINGLE_TILE:
                zero_tail(grad_query_ptr, cu_seqlens_q_ptr, batch, query_rows, tile, tiles, head, grad_query_heads,
                          HEAD_DIM, BLOCK_QUERIES)
            return
    words = tl.cdiv(keys, 32)
    first_query, queries = sequence_bounds(cu_seqlens_q_ptr, batch, queries)
    first_key, keys = sequence_bounds(cu_seqlens_k_ptr, batch, keys)
    # The first tile stays: as a single tile it owes zeros to the other side of an empty sequence.
    if tile * BLOCK_KEYS >= tl.maximum(keys, 1):
        return
    column = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    valid = key_mask(mask_ptr, batch, column, keys)
    query_ptr = sequence_ptr(query_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                             query_batch_stride, query_row_stride, query_head_stride, HEAD_DIM)
    grad_out_ptr = sequence_ptr(grad_out_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                                grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride, HEAD_DIM)
    key_ptr = sequence_ptr(key_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                           key_batch_stride, key_row_stride, key_head_stride, HEAD_DIM)
    value_ptr = sequence_ptr(value_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                             value_batch_stride, value_row_stride, value_head_stride, HEAD_DIM)
    # fmt: on
    if bias_ptr is not None:
        bias_ptr += batch * bias_batch_stride + head * bias_head_stride
    key = load_rows(key_ptr, column, valid, key_row_stride, HEAD_DIM)
    value = load_rows(value_ptr, column, valid, value_row_stride, HEAD_DIM)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    if ids_ptr is not None:
        batch_head = sequence_head(ids_ptr, batch, head, heads)
    CHANNELS: tl.constexpr = block_of(HEAD_DIM)
    grad_key = tl.zeros((BLOCK_KEYS, CHANNELS) if TRANSPOSED else (CHANNELS, BLOCK_KEYS), tl.float32)
    grad_value = tl.zeros((BLOCK_KEYS, CHANNELS) if TRANSPOSED else (CHANNELS, BLOCK_KEYS), tl.float32)
    for start in range(0, queries, BLOCK_QUERIES):
        row = start + tl.arange(0, BLOCK_QUERIES)
        inside = row < queries
        query = load_rows(query_ptr, row, inside, query_row_stride, HEAD_DIM)
        grad_out = load_rows(grad_out_ptr, row, inside, grad_out_row_stride, HEAD_DIM)
        stats = head * query_rows + first_query + row
        lse_2 = load_lse_2(lse_ptr, stats, inside)
        if SINGLE_TILE:
            out = load_rows(out_ptr + (first_query * heads + head) * HEAD_DIM, row, inside, heads * HEAD_DIM, HEAD_DIM)
            delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + stats, mask=inside, other=0.0)
        bias = None
        if bias_ptr is not None:
            bias = load_bias(
                bias_ptr, row, column, valid, queries, bias_row_stride, bias_column_stride, scale, TRANSPOSED
            )
        p_dropped, grad_scores = score_gradients(
            query, key, value, bias, grad_out, lse_2, delta, valid, seed, bits_ptr, words, stats, inside, batch_head,
            row, tile * BLOCK_KEYS, scale, threshold, keep_scale, seed_ptr is not None, BLOCK_KEYS, TRANSPOSED,
        )  # fmt: skip
        p_dropped, grad_scores = p_dropped.to(grad_out.dtype), grad_scores.to(query.dtype)
        if not TRANSPOSED:
            grad_value = tl.dot(tl.trans(grad_out), p_dropped, grad_value, input_precision="ieee")
            grad_key = tl.dot(tl.trans(query), grad_scores, grad_key, input_precision="ieee")
            grad_query = tl.dot(grad_scores, key, input_precision="ieee")
        else:
            grad_value = tl.dot(p_dropped, grad_out, grad_value, input_precision="ieee")
            grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
            if SINGLE_TILE:
                grad_query = tl.trans(tl.dot(tl.trans(key), grad_scores, input_precision="ieee"))
        if SINGLE_TILE:
            store_rows(grad_query_ptr, grad_query * scale, first_query, row, queries, head, grad_query_heads, HEAD_DIM)
    grad_key = grad_key if TRANSPOSED else tl.trans(grad_key)
    grad_value = grad_value if TRANSPOSED else tl.trans(grad_value)
    store_rows(grad_key_ptr, grad_key * scale, first_key, column, keys, head, grad_key_heads, HEAD_DIM)
    store_rows(grad_value_ptr, grad_value * keep_scale, first_key, column, keys, head, grad_key_heads, HEAD_DIM)


@dataclass(frozen=True)
class BackwardLaunch:
    """One launch of the backward.

    Attributes:
        kernel: the jit function.
        config: its configuration.
        tiles: tiles of one head and sequence, each a program.
    """

    kernel: Any
    config: LaunchConfig
    tiles: int


def backward_launches(configs: tuple[LaunchConfig, ...], queries: int, keys: int) -> list[BackwardLaunch]:
    """The launches of one call.

    Args:
        configs: both kernels', or that of the one that runs alone (``SINGLE_TILE``).
        queries: the largest number of queries of a sequence.
        keys: the largest number of keys of a sequence.

    Returns:
        One or two launches.

    Raises:
        ValueError: some gradient would not be written, or be written twice.
    """
    kernels = {
        kernel.fn.__name__: kernel for kernel in (attention_backward_query_kernel, attention_backward_key_kernel)
    }
    alone = [bool(config["SINGLE_TILE"]) for config in configs]
    if alone not in ([True], [False, False]) or len({config.kernel for config in configs}) < len(configs):
        raise ValueError(
            f"config: got {'; '.join(map(str, configs))}, expected both kernels without SINGLE_TILE or one with it"
        )
    launches = []
    for config in configs:
        by_query = config.kernel == attention_backward_query_kernel.fn.__name__
        rows, block = (queries, config["BLOCK_QUERIES"]) if by_query else (keys, config["BLOCK_KEYS"])
        launches.append(BackwardLaunch(kernels[config.kernel], config, ceil_div(rows, block)))
    return launches


@settled
def _prepare(
    config: Configs, dtype: torch.dtype, device: torch.device, query: torch.Size, key: torch.Size, packed: Bounds,
    dropout_p: float, softmax_scale: float, shared: int, bias: Strides, *strides: tuple[int, ...],
) -> tuple[Prepared, ...]:  # fmt: skip
    batch, queries, keys = sizes(query, key, packed)
    names = ("attention_backward_query_kernel", "attention_backward_key_kernel")
    shapes = {"queries": queries, "keys": keys, "head_dim": query[-1]} | ({} if bias is None else {"bias": 1})
    configs = resolve(config, names, Features(dtype, device), **shapes)
    named = list(zip(("grad_out", "query", "key", "value"), strides, strict=True))
    numbers = arguments(query, key, packed, dropout_p, softmax_scale, named, bias)
    numbers |= {"grad_query_heads": query[-2] * (3 if shared == 3 else 1), "grad_key_heads": key[-2] * max(shared, 1)}
    return tuple(
        Prepared(one.kernel, (batch * query[-2] * one.tiles,), one.config, **numbers)
        for one in backward_launches(configs, queries, keys)
    )


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
    packing: Packing | None = None,
    dropout_ids: Tensor | None = None,
    shared: int = 0,
    bias: Tensor | None = None,
    config: Configs = None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, contiguous; arguments as ``attention_forward`` takes and returns them. With
    ``shared`` 3 they are one tensor (..., 3, H, D); with 2 those of key and value are one (..., 2, H, D)."""
    inputs = (query, key, value)
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[: 3 - shared]]
    apart = list(gradients)
    if shared:
        gradients.append(key.new_empty((*key.shape[:-2], shared, *key.shape[-2:])))
        apart += gradients[-1].unbind(-3)
    launches = _prepare(
        config if config is None or isinstance(config, LaunchConfig) else tuple(config),
        query.dtype, query.device, query.shape, key.shape, bounds(packing), dropout_p, softmax_scale,
        shared, bias_strides(bias), grad_out.stride(), query.stride(), key.stride(), value.stride(),
    )  # fmt: skip
    # A kernel that runs alone does not follow this pointer.
    delta = lse if len(launches) == 1 else torch.empty_like(lse)
    cu_seqlens_q, cu_seqlens_k = packing[:2] if packing else (None, None)
    masks = mask, bias, cu_seqlens_q, cu_seqlens_k, seed, dropout_ids, keep_bits(lse, query.shape[-2], torch.int32)
    for launch in launches:
        launch(grad_out, query, key, value, *masks, out, lse, delta, *apart)
    return tuple(gradients)


# (queries, keys, head_dim, dtype, packed) of what the static checks compile.
STATIC_SHAPES = [
    *((*lengths, 64, torch.bfloat16, False) for lengths in ((325, 325), (13, 325), (325, 13), (65, 65), (13, 13))),
    *((*lengths, 64, torch.bfloat16, True) for lengths in ((325, 325), (325, 13))),
    (325, 325, 128, torch.bfloat16, False),
    # SigLIP so400m at 384 px.
    (729, 729, 72, torch.bfloat16, False),
    (325, 325, 64, torch.float32, False),
]


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    entries = []
    for queries, keys, head_dim, dtype, packed in STATIC_SHAPES:
        configs = select("attention", "backward", dtype, arch, queries=queries, keys=keys, head_dim=head_dim)
        for one in backward_launches(configs, queries, keys):
            entries.append(entry(one.kernel, one.config, dtype, head_dim, packed))
    for queries, keys, head_dim, dtype in BIASED_SHAPES:
        configs = select("attention", "backward", dtype, arch, queries=queries, keys=keys, head_dim=head_dim, bias=1)
        for one in backward_launches(configs, queries, keys):
            entries.append(entry(one.kernel, one.config, dtype, head_dim, bias=True))
    return entries
