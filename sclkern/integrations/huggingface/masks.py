"""Masks of Hugging Face models: those that ours makes, and which of them are padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sclkern.ops.dispatch import may_read

# Masks add the smallest number of their dtype to a score that is masked, or -10000 in older models.
MASKED_BELOW = -5000.0


def mask(*args: Any, **options: Any) -> Tensor | None:
    """The mask function that goes with ``attention`` in Hugging Face's mask interface.

    Args:
        *args: positional arguments of the interface; they are passed to Hugging Face's own mask function.
        **options: its keyword arguments, such as ``attention_mask`` (B, Lk), ``mask_function`` and ``kv_length``.

    Returns:
        A float mask to be added to the scores: (B, 1, 1, Lk), one row for all queries, where only padding is masked;
        otherwise the mask of Hugging Face's eager attention, (B, 1, Lq, Lk); None if nothing is masked.
    """
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    padding = options.get("attention_mask")
    bidirectional = options.get("mask_function") is bidirectional_mask_function and not args
    full: Tensor | None
    if not bidirectional or options.get("kv_offset", 0) or (padding is not None and padding.ndim != 2):
        # Never None here: without a mask, ``attention`` could not tell a causal model from an encoder.
        full = eager_mask(*args, **options)
        return full
    if padding is None:
        return None
    if padding.shape[-1] != options["kv_length"]:
        full = eager_mask(*args, **options)
        return full
    if may_read(padding) and bool(padding.all()):
        return None
    dtype = options.get("dtype", torch.float32)
    added = torch.zeros(padding.shape, dtype=dtype, device=padding.device)
    return added.masked_fill(~padding.bool(), torch.finfo(dtype).min)[:, None, None, :]


def key_padding(attention_mask: Tensor | None, batch: int, queries: int) -> tuple[Tensor | None, str | None]:
    """Convert an attention mask to the key padding mask of ``ops.attention``.

    Args:
        attention_mask: (B or 1, 1, Lq or 1, Lk), bool (True = attend) or float (added to the scores); None attends to
            all.
        batch: B.
        queries: Lq.

    Returns:
        The mask (B, Lk) bool, True = attend, or None where nothing is masked; and the reason why it cannot be
        converted, or None.
    """
    if attention_mask is None:
        return None, None
    if attention_mask.ndim != 4 or attention_mask.shape[1] != 1:
        return None, f"a mask of shape {tuple(attention_mask.shape)}"
    if attention_mask.shape[2] != 1 and queries != 1 and attention_mask.stride(2) != 0:
        return None, "a mask that may differ between queries, such as a causal one"
    row = attention_mask[:, 0, 0].expand(batch, -1)
    if row.dtype == torch.bool:
        return row, None
    attend = row > MASKED_BELOW
    if may_read(row) and bool((attend & (row != 0)).any()):
        return None, "a mask that adds numbers other than 0"
    return attend, None
