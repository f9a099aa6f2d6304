"""Softmax and dropout of cross-attention into whose few queries projections were folded; see ``cross_attention``.

Scores of 18 queries and 325 keys come from a matrix product over the full width, and so do the sums over the context:
what lies between reads each score once and writes each probability once, forward and backward. Row r of the scores is
query r % Lq of batch and head r // Lq.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import LaunchConfig, resolve, select
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.dropout import dropout_keep_mask, sequence_head
from sclkern.kernels.launch import launch, static_entry
from sclkern.reference import attention_dropout_threshold

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_probabilities(
    scores_ptr, mask_ptr, seed_ptr, ids_ptr, row, offset, column, heads, queries, keys, threshold,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Softmax of rows, and which of it dropout keeps (all without dropout); both (rows, BLOCK_COLUMNS)."""
    batch_head = row // queries
    batch, head = batch_head // heads, (batch_head % heads).to(tl.int32)
    valid = (column < keys)[None, :]
    if mask_ptr is not None:
        seen = tl.load(mask_ptr + batch[:, None] * keys + column[None, :], mask=valid, other=0)
        valid = valid & (seen != 0)
    scores = tl.load(scores_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    scores = tl.where(valid, scores * LOG2_E, -float("inf"))
    m_i = tl.max(scores, 1, keep_dims=True)
    # Without a valid key this would be -inf - -inf.
    p = tl.exp2(scores - tl.where(m_i == -float("inf"), 0.0, m_i))
    l_i = tl.sum(p, 1, keep_dims=True)
    p = p / tl.where(l_i == 0.0, 1.0, l_i)
    keep = p >= 0.0
    if seed_ptr is not None:
        key = sequence_head(ids_ptr, batch, head, heads)
        query = (row % queries).to(tl.int32)
        group = tl.arange(0, BLOCK_COLUMNS // 8)
        keep = dropout_keep_mask(tl.load(seed_ptr), key[:, None], query[:, None], group[None, :], threshold)
    return p, keep


@triton.jit(do_not_specialize=["rows", "heads", "queries", "keys", "threshold"])
def cross_attention_softmax_forward_kernel(
    scores_ptr,  # (B, H, Lq, Lk)
    mask_ptr,  # (B, Lk) bool, or None
    seed_ptr,  # (1,) int64, or None without dropout
    ids_ptr,  # (B,) int64, which key the dropout mask in place of the index, or None
    out_ptr,  # (B, H, Lq, Lk)
    total_ptr,  # (B, H, Lq): sums of the rows of out
    rows,
    heads,
    queries,
    keys,
    threshold,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    # Rows beyond the last read what the last does, and write nothing.
    read = tl.minimum(row, rows - 1)
    offset = read[:, None] * keys + column[None, :]
    # fmt: off
    p, keep = row_probabilities(scores_ptr, mask_ptr, seed_ptr, ids_ptr, read, offset, column, heads, queries, keys,
                                threshold, BLOCK_COLUMNS)
    # fmt: on
    p = tl.where(keep, p * keep_scale, 0.0)
    inside = row < rows
    tl.store(out_ptr + offset, p.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < keys)[None, :])
    tl.store(total_ptr + row, tl.sum(p, 1).to(total_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "heads", "queries", "keys", "threshold"])
def cross_attention_softmax_backward_kernel(
    grad_out_ptr,  # (B, H, Lq, Lk)
    grad_total_ptr,  # (B, H, Lq)
    scores_ptr,  # (B, H, Lq, Lk)
    mask_ptr,  # (B, Lk) bool, or None
    seed_ptr,  # (1,) int64, or None without dropout
    ids_ptr,  # (B,) int64, or None
    grad_scores_ptr,  # (B, H, Lq, Lk)
    rows,
    heads,
    queries,
    keys,
    threshold,
    keep_scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    read = tl.minimum(row, rows - 1)
    offset = read[:, None] * keys + column[None, :]
    # fmt: off
    p, keep = row_probabilities(scores_ptr, mask_ptr, seed_ptr, ids_ptr, read, offset, column, heads, queries, keys,
                                threshold, BLOCK_COLUMNS)
    # fmt: on
    grad = tl.load(grad_out_ptr + offset, mask=(column < keys)[None, :], other=0.0).to(tl.float32)
    grad += tl.load(grad_total_ptr + read).to(tl.float32)[:, None]
    grad = tl.where(keep, grad * keep_scale, 0.0)
    grad = p * (grad - tl.sum(p * grad, 1, keep_dims=True))
    inside = (row < rows)[:, None] & (column < keys)[None, :]
    tl.store(grad_scores_ptr + offset, grad.to(grad_scores_ptr.dtype.element_ty), mask=inside)


def _launch(
    kernel: Any, config: LaunchConfig | None, scores: Tensor, mask: Tensor | None, seed: Tensor | None,
    dropout_ids: Tensor | None, dropout_p: float, /, **tensors: Tensor,
) -> None:  # fmt: skip
    batch, heads, queries, keys = scores.shape
    rows = batch * heads * queries
    (chosen,) = resolve(config, (kernel.fn.__name__,), scores, columns=keys)
    threshold, keep_scale = attention_dropout_threshold(dropout_p)
    launch(
        kernel,
        (ceil_div(rows, chosen["BLOCK_ROWS"]),),
        chosen,
        scores_ptr=scores,
        mask_ptr=mask,
        seed_ptr=seed,
        ids_ptr=dropout_ids,
        rows=rows,
        heads=heads,
        queries=queries,
        keys=keys,
        threshold=threshold,
        keep_scale=keep_scale,
        **{f"{name}_ptr": tensor for name, tensor in tensors.items()},
    )


def cross_attention_softmax_forward(
    scores: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dropout_ids: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Contiguous scores (B, H, Lq, Lk): what dropout leaves of their softmax, and the sums of its rows (B, H, Lq)."""
    out, total = torch.empty_like(scores), scores.new_empty(scores.shape[:3])
    if out.numel():
        common = scores, mask, seed, dropout_ids, dropout_p
        _launch(cross_attention_softmax_forward_kernel, config, *common, out=out, total=total)
    return out, total if out.numel() else total.zero_()


def cross_attention_softmax_backward(
    grad_out: Tensor,
    grad_total: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dropout_ids: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Gradient of the scores, from those of both results; all contiguous."""
    grad_scores = torch.empty_like(scores)
    if scores.numel():
        tensors = {"grad_out": grad_out, "grad_total": grad_total, "grad_scores": grad_scores}
        common = scores, mask, seed, dropout_ids, dropout_p
        _launch(cross_attention_softmax_backward_kernel, config, *common, **tensors)
    return grad_scores


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile: rows of 325 keys, with mask and dropout."""
    names = ("scores", "out", "total", "grad_out", "grad_total", "grad_scores")
    signature = {f"{name}_ptr": "*bf16" for name in names}
    signature |= {"mask_ptr": "*i1", "seed_ptr": "*i64", "ids_ptr": "*i64", "keep_scale": "fp32"}
    entries = []
    for pass_, kernel in (
        ("forward", cross_attention_softmax_forward_kernel),
        ("backward", cross_attention_softmax_backward_kernel),
    ):
        (config,) = select("cross_attention_queries", pass_, torch.bfloat16, arch, columns=325)
        entries.append(static_entry(kernel, config, signature))
    return entries
