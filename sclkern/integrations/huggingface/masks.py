"""Masks of Hugging Face models: those that ours makes, and which of them are padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# Masks add the smallest number of their dtype to a score that is masked, or -10000 in older models.
MASKED_BELOW = -5000.0


def mask(*args: Any, **options: Any) -> Tensor | None:
    """The mask function that goes with ``attention`` in Hugging Face's mask interface.

    Args:
        *args: positional arguments of the interface; they are passed to Hugging Face's own mask function.
        **options: its keyword arguments, such as ``attention_mask`` (B, Lk), ``mask_function`` and ``kv_length``.

    Returns:
        The mask that a fused model makes by itself, otherwise that of Hugging Face's eager attention: (B, 1, Lq, Lk),
        or None. Where only padding is masked, ``key_padding`` knows that.
    """
    from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function

    own = getattr(options.get("config"), "_attn_implementation_internal", None)
    padding = options.get("attention_mask")
    full: Tensor | None = AttentionMaskInterface()["sdpa" if own == "sdpa" else "eager"](*args, **options)
    if full is None or padding is None or args or options.get("mask_function") is not bidirectional_mask_function:
        return full
    if not options.get("kv_offset", 0) and tuple(padding.shape) == (full.shape[0], full.shape[-1]):
        if torch.compiler.is_compiling():
            full = full[:, :, :1].expand(full.shape)
        _remember(full, padding.bool())
    return full


def key_padding(attention_mask: Tensor | None, batch: int, queries: int) -> tuple[Tensor | None, str | None]:
    """Convert an attention mask to the key padding mask of ``ops.attention``, where it surely is padding.

    Bool masks of one row and those of ``mask`` are known by their form. The values of others are read once, which on a
    GPU waits for it; where that is not possible (torch.compile, CUDA graphs), they are not converted.

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
    if attention_mask.ndim != 4 or attention_mask.shape[1] != 1 or attention_mask.shape[2] not in (1, queries):
        return None, "a mask that is not of shape (B, 1, Lq, Lk)"
    if attention_mask.shape[0] not in (1, batch):
        return None, "a mask of another batch size"
    if attention_mask.requires_grad:
        return None, "a mask with a gradient"
    remembered = _remembered(attention_mask)
    if remembered is None:
        one_row = attention_mask.shape[2] == 1 or attention_mask.stride(2) == 0
        if one_row and attention_mask.dtype == torch.bool:
            return attention_mask[:, 0, 0].expand(batch, -1), None
        if not _readable(attention_mask):
            unread = "a float mask, whose values cannot be read under torch.compile or in a CUDA graph"
            return None, unread if one_row else "a mask that may differ between queries, such as a causal one"
        remembered = _remember(attention_mask, _read(attention_mask, one_row))
    if isinstance(remembered, str):
        return None, remembered
    return remembered.expand(batch, -1), None


def added(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as Hugging Face's eager functions take it.

    Args:
        attention_mask: bool (True = attend) or float.
        dtype: of the scores.

    Returns:
        Float, added to the scores.
    """
    if attention_mask.dtype != torch.bool:
        return attention_mask
    zero = torch.zeros((), dtype=dtype, device=attention_mask.device)
    return torch.where(attention_mask, zero, torch.finfo(dtype).min)


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """The causal mask of torch's attention: query i attends to keys 0 to i.

    Args:
        queries: Lq.
        keys: Lk.
        device: where to make it.

    Returns:
        (1, 1, Lq, Lk) bool, True = attend.
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]


def _read(attention_mask: Tensor, one_row: bool) -> Tensor | str:
    """The padding (B or 1, Lk) that a mask's values are, or the reason why they are none."""
    rows = attention_mask[:, 0]
    if not one_row and not bool((rows == rows[:, :1]).all()):
        return "a mask that differs between queries, such as a causal one"
    row = rows[:, 0]
    if row.dtype == torch.bool:
        return row
    attend = row == 0
    return attend if bool((attend | (row < MASKED_BELOW)).all()) else "a mask that adds numbers other than 0"


def _readable(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor) or torch.jit.is_tracing():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _remember(attention_mask: Tensor, padding: Tensor | str) -> Tensor | str:
    """Keep with a mask what it is, until it is changed in place, which an inference tensor does not tell."""
    if torch.compiler.is_compiling():
        attention_mask._sclkern_padding = (padding, None)  # type: ignore[attr-defined]
    elif not attention_mask.is_inference():
        attention_mask._sclkern_padding = (padding, attention_mask._version)  # type: ignore[attr-defined]
    return padding


def _remembered(attention_mask: Tensor) -> Tensor | str | None:
    padding, version = getattr(attention_mask, "_sclkern_padding", (None, None))
    if padding is None:
        return None
    # torch.compile cannot ask for the version, but nothing writes into a mask whose rows share their memory.
    unchanged = version is None if torch.compiler.is_compiling() else version == attention_mask._version
    return padding if unchanged else None
