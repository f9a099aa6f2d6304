"""The dropout mask of attention, drawn once for the forward and both kernels of the backward: a bit a probability.

Without it each of the three draws the mask anew, which costs it more instructions than to read it. Dimensions and
``cu_seqlens`` as in ``attention``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sclkern.kernels.config import Features, LaunchConfig, resolve, select
from sclkern.kernels.config_rules import ceil_div
from sclkern.kernels.dropout import dropout_keep_bits, sequence_head
from sclkern.kernels.launch import launch, static_entry
from sclkern.reference import attention_dropout_threshold


@triton.jit(do_not_specialize=["heads", "queries", "keys", "query_rows", "threshold"])
def attention_dropout_kernel(
    cu_seqlens_q_ptr,  # (B + 1,) int32, or None
    cu_seqlens_k_ptr,  # (B + 1,) int32, or None
    seed_ptr,  # (1,) int64
    ids_ptr,  # (B,) int64, which key the mask in place of the index, or None
    bits_ptr,  # (H, T, words of 32 keys) as uint8; bits of no probability are left as they were
    heads,
    queries,  # Lq, of packed sequences the largest
    keys,
    query_rows,  # T
    threshold,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    tiles = tl.cdiv(queries, ROWS)
    batch_head = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    row_bytes = tl.cdiv(keys, 32) * 4
    first = batch * queries
    if cu_seqlens_q_ptr is not None:
        first = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
        queries = (tl.load(cu_seqlens_q_ptr + batch + 1) - first).to(tl.int32)
        keys = tl.load(cu_seqlens_k_ptr + batch + 1) - tl.load(cu_seqlens_k_ptr + batch)
    key = sequence_head(ids_ptr, batch, head, heads)
    seed = tl.load(seed_ptr)
    offset = (head * query_rows + first + row) * row_bytes
    inside = row < queries
    for start in range(0, tl.cdiv(keys, 8), GROUPS):
        group = start + tl.arange(0, GROUPS)
        bits = dropout_keep_bits(seed, key, row[:, None], group[None, :], threshold)
        mask = inside[:, None] & (group < row_bytes)[None, :]
        tl.store(bits_ptr + offset[:, None] + group[None, :], bits, mask=mask)


def attention_dropout(
    bits: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor,
    dropout_ids: Tensor | None,
    counts: tuple[int, ...],
    dropout_p: float,
    like: Features,
    config: LaunchConfig | None = None,
) -> None:
    """Fill the bits (of ``attention_statistics``, as uint8); ``counts`` are sequences, heads, and the queries and keys
    of the longest sequence, ``like`` are the features of attention."""
    sequences, heads, queries, keys = counts
    (chosen,) = resolve(config, ("attention_dropout_kernel",), like)
    words = ceil_div(keys, 32)
    launch(
        attention_dropout_kernel,
        (sequences * heads * ceil_div(queries, chosen["ROWS"]),),
        chosen,
        cu_seqlens_q_ptr=cu_seqlens_q,
        cu_seqlens_k_ptr=cu_seqlens_k,
        seed_ptr=seed,
        ids_ptr=dropout_ids,
        bits_ptr=bits,
        heads=heads,
        queries=queries,
        keys=keys,
        query_rows=bits.numel() // max(1, heads * words * 4),
        threshold=attention_dropout_threshold(dropout_p)[0],
    )


def ahead_of_time(arch: str) -> list[dict[str, Any]]:
    """What the static checks compile for an architecture."""
    (config,) = select("attention_dropout", "forward", torch.bfloat16, arch)
    signature = {"seed_ptr": "*i64", "ids_ptr": "*i64", "bits_ptr": "*u8"}
    return [static_entry(attention_dropout_kernel, config, signature, cu_seqlens_q_ptr=None, cu_seqlens_k_ptr=None)]
