"""What the forward of attention leaves for its backward beside the output: log-sum-exps, and a dropout mask if one was
drawn.

They are one float32 tensor, so that a call without a mask allocates nothing for it: (H, T) of the queries, then, where
the configuration of the forward sets KEEP_BITS, as many rows of T as hold (H, T, words) of bits, a word for 32 keys.
Nothing here needs Triton.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sclkern.kernels.config import Features, resolve
from sclkern.kernels.config_rules import ceil_div


def rows_with_bits(heads: int, keys: int) -> int:
    """Rows of T of the statistics with bits.

    Args:
        heads: H.
        keys: the largest number of keys of a sequence.

    Returns:
        Rows of the log-sum-exps and of the bits.
    """
    return heads * (1 + ceil_div(keys, 32))


def keep_bits(statistics: Tensor, heads: int, dtype: torch.dtype) -> Tensor | None:
    """The bits of a mask.

    Args:
        statistics: of the forward.
        heads: H.
        dtype: integers that the bits are read as.

    Returns:
        The rows of bits; None where there are none.
    """
    return statistics[heads:].view(dtype) if statistics.shape[0] > heads else None


def fake_statistics(
    query: Tensor, key: Tensor, seed: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_k: int, **_: object
) -> Tensor:
    """Statistics as the selected configuration of the forward has them; arguments of the op by name."""
    heads = query.shape[-2]
    # Float64 has no kernel, and so no configuration.
    if seed is not None and query.dtype != torch.float64:
        features = Features(query.dtype, query.device)
        # KEEP_BITS is the same at all lengths, which may be no numbers here.
        (config,) = resolve(None, ("attention_forward_kernel",), features, queries=64, keys=64, head_dim=64)
        if config["KEEP_BITS"]:
            heads = rows_with_bits(heads, key.shape[1] if cu_seqlens_k is None else max(max_seqlen_k, 1))
    # Not numel(), which would tie a compiled graph to this length.
    return query.new_empty((heads, math.prod(query.shape[:-2])), dtype=torch.float32)
