"""The backward of attention: probabilities are computed again from the log-sum-exp; no atomics, so results repeat.

Two launches, one by queries and one by keys; a single one where one tile holds all queries or all keys (``ALONE``),
which then writes the gradients of the other side directly. Dimensions and ``cu_seqlens`` as in ``attention``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.attention import (
    GROUP_ROWS,
    GROUP_WARPS,
    LENGTHS,
    LOG2_E,
    TILES,
    Packing,
    arguments,
    clear_rest,
    entry,
    existing_keys,
    kept,
    load_lse_2,
    load_rows,
    origin,
    sequence,
    sizes,
    store_rows,
    tile,
    tiles,
    warps,
)

# As LARGEST_FORWARD and FORWARD_PER_WARP; smaller, because two or three accumulators are held.
LARGEST_BACKWARD = {2: ((64, 32), (64, 32)), 4: ((32, 32), (16, 32))}
BACKWARD_PER_WARP = {2: 640, 4: 512}
# Two bytes, by kernel and ALONE: rows of a program that have four warps at most, by D. Two groups that share 64 rows
# would each issue the addresses, barriers and exchanges of a whole tile. Beside: instructions a score with dropout for
# D 64, and why others have more. Read from machine code for sm_90, as the tiles are; not measured on a GPU yet.
ONE_GROUP = {
    # 64 x 32: 30, and more warps fit; in 64 x 64 on 8 warps 43.
    ("query", False): {32: (64, 32), 64: (64, 32), 128: (64, 32)},
    # 32 x 64: 38; in 64 x 64 on 8 warps 58. 32 x 32 of D 32: 248 registers; D 128: two accumulators of 64 x 128 spill.
    ("key", False): {32: (64,), 64: (64, 32), 128: ()},
    # 32 x 64: 50; on 8 warps 75. Of 64 queries: 254 registers.
    ("query", True): {32: (32, 16), 64: (32, 16), 128: (32, 16)},
    # 64 x 16: 94; on 8 warps 150. Of 32 and 64 keys: up to 255 registers.
    ("key", True): {32: (16,), 64: (16,), 128: ()},
}
# Most scores of a step of the key kernel where it holds the gradient of the queries too, by D: more would spill.
ALONE_SCORES = {2: {32: 1024, 64: 2048, 128: 512}, 4: {32: 256, 64: 256, 128: 256}}


@triton.jit
def score_gradients(
    query, key, value, grad_out, lse_2, delta, valid, seed, batch_head, row, first_key, scale, threshold, keep_scale,
    DROPOUT: tl.constexpr, BLOCK_KEYS: tl.constexpr, KEY_AXIS: tl.constexpr,
):  # fmt: skip
    """Probabilities that dropout left and the gradient of the scores, in the dtype of the operands.

    (queries, keys) where ``KEY_AXIS`` is 1, (keys, queries) where it is 0.
    """
    if KEY_AXIS == 1:
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
    else:
        scores = tl.dot(key, tl.trans(query), input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
    scores = scores * (scale * LOG2_E) - tl.expand_dims(lse_2, KEY_AXIS)
    # Before the exponential: padding scores 0, and 2 to the power of 0 - lse can overflow.
    weights = tl.exp2(tl.where(tl.expand_dims(valid, 1 - KEY_AXIS), scores, -float("inf")))
    used = weights
    if DROPOUT:
        keep = kept(seed, batch_head, row, first_key, threshold, BLOCK_KEYS)
        if KEY_AXIS == 0:
            keep = tl.trans(keep)
        used = tl.where(keep, weights, 0.0)
        grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
    grad_scores = weights * (grad_weights - tl.expand_dims(delta, KEY_AXIS))
    return used.to(grad_out.dtype), grad_scores.to(query.dtype)


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_query_kernel(
    grad_out_ptr,  # (B, Lq, H, D) or (T, H, D)
    query_ptr,  # as grad_out
    key_ptr,  # (B, Lk, H, D) or (T, H, D)
    value_ptr,  # as key
    mask_ptr,  # (B, Lk) bool, contiguous, or None
    cu_seqlens_q_ptr,  # (B + 1,) int32, or None
    cu_seqlens_k_ptr,  # (B + 1,) int32, or None
    seed_ptr,  # (1,) int64, or None without dropout
    out_ptr,  # as query, contiguous
    lse_ptr,  # (H, T) float32, base 2
    delta_ptr,  # (H, T) float32: rowsum(grad_out * out), written for the other kernel
    grad_query_ptr,  # as query, contiguous
    grad_key_ptr,  # as key, contiguous
    grad_value_ptr,  # as key, contiguous
    heads,
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
    scale,
    threshold,
    keep_scale,
    HEAD: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ALONE: tl.constexpr,  # one tile holds all queries: keys and values get their gradients here as well
    KEY_AXIS: tl.constexpr,  # of the scores, see backward_plan
):
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    # fmt: off
    if cu_seqlens_q_ptr is not None:  # noqa: SIM102, None has no operator
        if tl.program_id(0) + heads * tiles >= tl.num_programs(0):
            clear_rest(grad_query_ptr, cu_seqlens_q_ptr, batch, query_rows, tile, tiles, head, heads,
                       HEAD, BLOCK_QUERIES)
            if ALONE:
                clear_rest(grad_key_ptr, cu_seqlens_k_ptr, batch, key_rows, tile, tiles, head, heads, HEAD, BLOCK_KEYS)
                clear_rest(grad_value_ptr, cu_seqlens_k_ptr, batch, key_rows, tile, tiles, head, heads,
                           HEAD, BLOCK_KEYS)
            return
    first_query, queries = sequence(cu_seqlens_q_ptr, batch, queries)
    first_key, keys = sequence(cu_seqlens_k_ptr, batch, keys)
    # The first tile stays: alone, it owes zeros to the other side of an empty sequence.
    if tile * BLOCK_QUERIES >= tl.maximum(queries, 1):
        return
    row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    inside = row < queries
    query_ptr = origin(query_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                       query_batch_stride, query_row_stride, query_head_stride)
    grad_out_ptr = origin(grad_out_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                          grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride)
    key_ptr = origin(key_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                     key_batch_stride, key_row_stride, key_head_stride)
    value_ptr = origin(value_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                       value_batch_stride, value_row_stride, value_head_stride)
    # fmt: on
    query = load_rows(query_ptr, row, inside, query_row_stride, HEAD)
    grad_out = load_rows(grad_out_ptr, row, inside, grad_out_row_stride, HEAD)
    out = load_rows(out_ptr + (first_query * heads + head) * HEAD, row, inside, heads * HEAD, HEAD)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    statistics = head * query_rows + first_query + row
    lse_2 = load_lse_2(lse_ptr, statistics, inside)
    if not ALONE:
        tl.store(delta_ptr + statistics, delta, mask=inside)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    grad_query = tl.zeros((BLOCK_QUERIES, HEAD) if KEY_AXIS == 1 else (HEAD, BLOCK_QUERIES), tl.float32)
    for start in range(0, keys, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        valid = existing_keys(mask_ptr, batch, column, keys)
        key = load_rows(key_ptr, column, valid, key_row_stride, HEAD)
        value = load_rows(value_ptr, column, valid, value_row_stride, HEAD)
        used, grad_scores = score_gradients(
            query, key, value, grad_out, lse_2, delta, valid, seed, batch_head, row, start, scale, threshold,
            keep_scale, seed_ptr is not None, BLOCK_KEYS, KEY_AXIS,
        )  # fmt: skip
        if KEY_AXIS == 1:
            grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
        else:
            grad_query = tl.dot(tl.trans(key), grad_scores, grad_query, input_precision="ieee")
        if ALONE:
            if KEY_AXIS == 1:
                used, grad_scores = tl.trans(used), tl.trans(grad_scores)
            grad_value = tl.dot(used, grad_out, input_precision="ieee") * keep_scale
            grad_key = tl.dot(grad_scores, query, input_precision="ieee") * scale
            store_rows(grad_value_ptr, grad_value, first_key, column, keys, head, heads, HEAD)
            store_rows(grad_key_ptr, grad_key, first_key, column, keys, head, heads, HEAD)
    grad_query = grad_query if KEY_AXIS == 1 else tl.trans(grad_query)
    store_rows(grad_query_ptr, grad_query * scale, first_query, row, queries, head, heads, HEAD)


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_key_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, mask_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, seed_ptr, out_ptr,
    lse_ptr, delta_ptr, grad_query_ptr, grad_key_ptr, grad_value_ptr, heads, queries, keys, query_rows, key_rows,
    grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride,
    query_batch_stride, query_row_stride, query_head_stride,
    key_batch_stride, key_row_stride, key_head_stride,
    value_batch_stride, value_row_stride, value_head_stride,
    scale, threshold, keep_scale, HEAD: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ALONE: tl.constexpr,  # one tile holds all keys: queries get their gradient here as well, and delta is not read
    KEY_AXIS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    tile = tl.program_id(0) % tiles
    batch_head = tl.program_id(0) // tiles
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    # fmt: off
    if cu_seqlens_k_ptr is not None:  # noqa: SIM102, None has no operator
        if tl.program_id(0) + heads * tiles >= tl.num_programs(0):
            clear_rest(grad_key_ptr, cu_seqlens_k_ptr, batch, key_rows, tile, tiles, head, heads, HEAD, BLOCK_KEYS)
            clear_rest(grad_value_ptr, cu_seqlens_k_ptr, batch, key_rows, tile, tiles, head, heads, HEAD, BLOCK_KEYS)
            if ALONE:
                clear_rest(grad_query_ptr, cu_seqlens_q_ptr, batch, query_rows, tile, tiles, head, heads,
                           HEAD, BLOCK_QUERIES)
            return
    first_query, queries = sequence(cu_seqlens_q_ptr, batch, queries)
    first_key, keys = sequence(cu_seqlens_k_ptr, batch, keys)
    # The first tile stays: alone, it owes zeros to the other side of an empty sequence.
    if tile * BLOCK_KEYS >= tl.maximum(keys, 1):
        return
    column = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    valid = existing_keys(mask_ptr, batch, column, keys)
    query_ptr = origin(query_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                       query_batch_stride, query_row_stride, query_head_stride)
    grad_out_ptr = origin(grad_out_ptr, cu_seqlens_q_ptr, batch, first_query, head,
                          grad_out_batch_stride, grad_out_row_stride, grad_out_head_stride)
    key_ptr = origin(key_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                     key_batch_stride, key_row_stride, key_head_stride)
    value_ptr = origin(value_ptr, cu_seqlens_k_ptr, batch, first_key, head,
                       value_batch_stride, value_row_stride, value_head_stride)
    # fmt: on
    key = load_rows(key_ptr, column, valid, key_row_stride, HEAD)
    value = load_rows(value_ptr, column, valid, value_row_stride, HEAD)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    grad_key = tl.zeros((BLOCK_KEYS, HEAD) if KEY_AXIS == 0 else (HEAD, BLOCK_KEYS), tl.float32)
    grad_value = tl.zeros((BLOCK_KEYS, HEAD) if KEY_AXIS == 0 else (HEAD, BLOCK_KEYS), tl.float32)
    for start in range(0, queries, BLOCK_QUERIES):
        row = start + tl.arange(0, BLOCK_QUERIES)
        inside = row < queries
        query = load_rows(query_ptr, row, inside, query_row_stride, HEAD)
        grad_out = load_rows(grad_out_ptr, row, inside, grad_out_row_stride, HEAD)
        statistics = head * query_rows + first_query + row
        lse_2 = load_lse_2(lse_ptr, statistics, inside)
        if ALONE:
            out = load_rows(out_ptr + (first_query * heads + head) * HEAD, row, inside, heads * HEAD, HEAD)
            delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + statistics, mask=inside, other=0.0)
        used, grad_scores = score_gradients(
            query, key, value, grad_out, lse_2, delta, valid, seed, batch_head, row, tile * BLOCK_KEYS, scale,
            threshold, keep_scale, seed_ptr is not None, BLOCK_KEYS, KEY_AXIS,
        )  # fmt: skip
        if KEY_AXIS == 1:
            grad_value = tl.dot(tl.trans(grad_out), used, grad_value, input_precision="ieee")
            grad_key = tl.dot(tl.trans(query), grad_scores, grad_key, input_precision="ieee")
            grad_query = tl.dot(grad_scores, key, input_precision="ieee")
        else:
            grad_value = tl.dot(used, grad_out, grad_value, input_precision="ieee")
            grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
            if ALONE:
                grad_query = tl.trans(tl.dot(tl.trans(key), grad_scores, input_precision="ieee"))
        if ALONE:
            store_rows(grad_query_ptr, grad_query * scale, first_query, row, queries, head, heads, HEAD)
    grad_key = grad_key if KEY_AXIS == 0 else tl.trans(grad_key)
    grad_value = grad_value if KEY_AXIS == 0 else tl.trans(grad_value)
    store_rows(grad_key_ptr, grad_key * scale, first_key, column, keys, head, heads, HEAD)
    store_rows(grad_value_ptr, grad_value * keep_scale, first_key, column, keys, head, heads, HEAD)


def backward_plan(queries: int, keys: int, head: int, dtype: torch.dtype, largest: dict) -> list[tuple]:
    """The launches: kernel, rows that are spread over programs, their tile, and the configuration."""
    by_query = tiles(queries, keys, head, dtype, largest)
    by_key = tiles(keys, queries, head, dtype, largest)
    # A length of 0 has no kernel of its own to write the zeros of the other side, so it is never "alone".
    keys_alone = 0 < keys <= by_key[0] and queries > 0
    queries_alone = 0 < queries <= by_query[0] and keys > 0 and not keys_alone
    plan = []
    for name, wanted, rows, others, (block, other_block), alone in (
        ("query", not keys_alone, queries, keys, by_query, queries_alone),
        ("key", not queries_alone, keys, queries, by_key, keys_alone),
    ):
        # Rows that are spread over programs are those of the products; alone they may be fewer than GROUP_ROWS: then
        # the others are, and channels. Four bytes use the ordinary cores, and would spill.
        turned = alone and dtype.itemsize == 2 and (name == "query" or block < GROUP_ROWS)
        if alone and dtype.itemsize == 2 and head < 128:
            other_block = tile(others, GROUP_ROWS)
        if alone and name == "key":
            other_block = max(TILES[-1], min(other_block, ALONE_SCORES[dtype.itemsize][head] // block))
        block_queries, block_keys = (block, other_block) if name == "query" else (other_block, block)
        configuration = {"HEAD": head, "BLOCK_QUERIES": block_queries, "BLOCK_KEYS": block_keys, "ALONE": alone}
        configuration["KEY_AXIS"] = int((name == "query") != turned)
        configuration["num_warps"] = warps(block_queries, block_keys, head, dtype, BACKWARD_PER_WARP)
        if dtype.itemsize == 2 and block in ONE_GROUP[name, alone][head]:
            configuration["num_warps"] = min(configuration["num_warps"], GROUP_WARPS)
        if wanted:
            kernel = attention_backward_query_kernel if name == "query" else attention_backward_key_kernel
            plan.append((kernel, rows, block, configuration))
    return plan


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
    largest: dict = LARGEST_BACKWARD,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; shapes as ``attention_forward`` takes and returns them."""
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
    tensors = {"grad_out": grad_out, "query": query, "key": key, "value": value, "mask": mask, "seed": seed, "out": out}
    names = ("delta", "grad_query", "grad_key", "grad_value")
    written = dict(zip(names, (torch.empty_like(lse), *gradients), strict=True))
    shared = arguments(packing, dropout_p, softmax_scale, **tensors, lse=lse, **written)
    batch, queries, keys = sizes(query, key, packing)
    for kernel, rows, block, configuration in backward_plan(queries, keys, query.shape[-1], query.dtype, largest):
        programs = batch * query.shape[-2] * triton.cdiv(rows, block)
        if programs:
            kernel[(programs,)](**shared, **configuration)
    return tuple(gradients)


AHEAD_OF_TIME = [
    entry(kernel, dtype, configuration, packed)
    for queries, keys, head, dtype, packed in (
        *((*lengths, 64, torch.bfloat16, False) for lengths in ((325, 325), (13, 325), (325, 13), (65, 65), (13, 13))),
        *((*lengths, 64, torch.bfloat16, True) for lengths in ((325, 325), (325, 13))),
        (325, 325, 128, torch.bfloat16, False),
        (325, 325, 64, torch.float32, False),
    )
    for kernel, _, _, configuration in backward_plan(queries, keys, head, dtype, LARGEST_BACKWARD)
]
