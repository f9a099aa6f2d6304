"""The gradient of attention's bias: that of the scores, summed over the samples and heads that share a place of it.

A program owns a tile of the bias and adds up its samples and heads one after the other: no atomics, so results repeat,
and no scores of the whole batch in memory. Where these programs are few, each tile has several, whose float32 sums are
added afterwards. Scores are computed again, two products of the seven of a backward with this gradient. Dimensions as
in ``attention``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.attention import (
    BIASED_SHAPES,
    DYNAMIC_ARGS,
    Strides,
    arguments,
    bias_strides,
    entry,
    key_mask,
    load_bias,
    load_lse_2,
    load_rows,
    sequence_ptr,
)
from sclkern.kernels.attention_backward import score_gradients
from sclkern.kernels.attention_statistics import keep_bits
from sclkern.kernels.config import Features, LaunchConfig, resolve, select, settled
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.dropout import sequence_head
from sclkern.kernels.launch import Prepared


@triton.jit(do_not_specialize=[*DYNAMIC_ARGS, "bias_samples", "bias_heads", "samples_each", "heads_each", "splits"])
def attention_backward_bias_kernel(
    grad_out_ptr,  # (B, Lq, H, D)
    query_ptr,  # as grad_out
    key_ptr,  # (B, Lk, H, D)
    value_ptr,  # as key
    mask_ptr,  # (B, Lk) bool, contiguous, or None
    bias_ptr,  # (B or 1, H or 1, Lq, Lk), any strides
    seed_ptr,  # (1,) int64, or None without dropout
    ids_ptr,  # (B,) int64, or None
    bits_ptr,  # (H, B * Lq, words of 32 keys) int32: the dropout mask if it was drawn before the forward, or None
    out_ptr,  # as query, contiguous
    lse_ptr,  # (H, B * Lq) float32, base 2
    grad_bias_ptr,  # (splits, B or 1, H or 1, Lq, Lk), contiguous
    heads,
    bias_samples,  # of the bias, B or 1
    bias_heads,
    samples_each,  # that share a place of the bias
    heads_each,
    splits,
    queries,
    keys,
    query_rows,  # B * Lq
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
    bias_batch_stride,
    bias_head_stride,
    bias_row_stride,
    bias_column_stride,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    key_tiles, query_tiles = tl.cdiv(keys, BLOCK_KEYS), tl.cdiv(queries, BLOCK_QUERIES)
    first_key = tl.program_id(0) % key_tiles * BLOCK_KEYS
    tile = tl.program_id(0) // key_tiles
    place = (tile // query_tiles).to(tl.int64)
    row = tile % query_tiles * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    column = first_key + tl.arange(0, BLOCK_KEYS)
    inside = row < queries
    bias_head, bias_sample = place % bias_heads, place // bias_heads % bias_samples
    split = place // bias_heads // bias_samples
    bias_ptr += bias_sample * bias_batch_stride + bias_head * bias_head_stride
    bias = load_bias(bias_ptr, row, column, column < keys, queries, bias_row_stride, bias_column_stride, scale, False)
    words = tl.cdiv(keys, 32)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    grad_bias = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    terms = samples_each * heads_each
    each = tl.cdiv(terms, splits)
    first = split.to(tl.int32) * each
    for term in range(first, tl.minimum(first + each, terms)):
        batch, head = bias_sample + term // heads_each, bias_head + term % heads_each
        valid = key_mask(mask_ptr, batch, column, keys)
        # fmt: off
        query = load_rows(sequence_ptr(query_ptr, None, batch, 0, head, query_batch_stride, query_row_stride,
                                       query_head_stride, HEAD_DIM), row, inside, query_row_stride, HEAD_DIM)
        grad_out = load_rows(sequence_ptr(grad_out_ptr, None, batch, 0, head, grad_out_batch_stride,
                                          grad_out_row_stride, grad_out_head_stride, HEAD_DIM),
                             row, inside, grad_out_row_stride, HEAD_DIM)
        key = load_rows(sequence_ptr(key_ptr, None, batch, 0, head, key_batch_stride, key_row_stride,
                                     key_head_stride, HEAD_DIM), column, valid, key_row_stride, HEAD_DIM)
        value = load_rows(sequence_ptr(value_ptr, None, batch, 0, head, value_batch_stride, value_row_stride,
                                       value_head_stride, HEAD_DIM), column, valid, value_row_stride, HEAD_DIM)
        out = load_rows(out_ptr + (batch * queries * heads + head) * HEAD_DIM, row, inside, heads * HEAD_DIM, HEAD_DIM)
        # fmt: on
        delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
        stats = head * query_rows + batch * queries + row
        lse_2 = load_lse_2(lse_ptr, stats, inside)
        batch_head = sequence_head(ids_ptr, batch, head, heads)
        _, grad_scores = score_gradients(
            query, key, value, bias, grad_out, lse_2, delta, valid, seed, bits_ptr, words, stats, inside, batch_head,
            row, first_key, scale, threshold, keep_scale, seed_ptr is not None, BLOCK_KEYS, False,
        )  # fmt: skip
        grad_bias += grad_scores
    place_rows = place * queries + row.to(tl.int64)
    offset = place_rows[:, None] * keys + column[None, :]
    mask = inside[:, None] & (column < keys)[None, :]
    tl.store(grad_bias_ptr + offset, grad_bias.to(grad_bias_ptr.dtype.element_ty), mask=mask)


@settled
def _prepare(
    config: LaunchConfig | None, dtype: torch.dtype, device: torch.device, query: torch.Size, key: torch.Size,
    bias: torch.Size, dropout_p: float, softmax_scale: float, bias_at: Strides, *strides: tuple[int, ...],
) -> tuple[Prepared, int]:  # fmt: skip
    (batch, queries, heads, head_dim), keys, (samples, bias_heads) = query, key[1], bias[:2]
    names = ("attention_backward_bias_kernel",)
    features = Features(dtype, device)
    (chosen,) = resolve(config, names, features, queries=queries, keys=keys, head_dim=head_dim)
    tiles = samples * bias_heads * ceil_div(queries, chosen["BLOCK_QUERIES"]) * ceil_div(keys, chosen["BLOCK_KEYS"])
    # Of an empty batch one sample is none.
    each = batch if samples == 1 else 1, heads if bias_heads == 1 else 1
    splits = max(1, min(each[0] * each[1], chosen["PROGRAMS"] // max(1, tiles)))
    named = list(zip(("grad_out", "query", "key", "value"), strides, strict=True))
    numbers = arguments(query, key, None, dropout_p, softmax_scale, named, bias_at)
    numbers |= {"bias_samples": samples, "bias_heads": bias_heads, "splits": splits}
    numbers |= {"samples_each": each[0], "heads_each": each[1]}
    return Prepared(attention_backward_bias_kernel, (tiles * splits,), chosen, **numbers), splits


def attention_backward_bias(
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
    bias: Tensor,
    dropout_ids: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Gradient of the bias, of its shape and dtype, contiguous; arguments as ``attention_forward`` takes and returns
    them."""
    launch, splits = _prepare(
        config, query.dtype, query.device, query.shape, key.shape, bias.shape, dropout_p, softmax_scale,
        bias_strides(bias), grad_out.stride(), query.stride(), key.stride(), value.stride(),
    )  # fmt: skip
    sums = bias.new_empty((splits, *bias.shape), dtype=bias.dtype if splits == 1 else torch.float32)
    bits = keep_bits(lse, query.shape[-2], torch.int32)
    launch(grad_out, query, key, value, mask, bias, seed, dropout_ids, bits, out, lse, sums)
    return sums[0] if splits == 1 else sums.sum(0).to(bias.dtype)


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    entries = []
    for queries, keys, head_dim, dtype in BIASED_SHAPES:
        (config,) = select("attention_bias", "backward", dtype, arch, queries=queries, keys=keys, head_dim=head_dim)
        entries.append(entry(attention_backward_bias_kernel, config, dtype, head_dim, bias=True))
    return entries
