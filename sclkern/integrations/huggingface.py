"""Fused attention for Hugging Face models: ``attn_implementation="sclkern"``.

``transformers`` is imported inside functions: the rest of sclkern works without it, and importing it takes seconds.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sclkern import ops
from sclkern.errors import UserError
from sclkern.ops.dispatch import may_read

# Masks add the smallest number of their dtype to a score that is masked, or -10000 in older models.
MASKED_BELOW = -5000.0
# Arguments of Hugging Face's attention functions that change the result and that the fused op does not have.
_UNSUPPORTED = ("position_bias", "softcap", "s_aux", "sliding_window", "head_mask", "cache")


def register_attention(name: str = "sclkern") -> None:
    """Register ``sclkern.ops.attention`` with ``transformers`` as ``attn_implementation=name``.

    It serves models that take their attention from ``transformers.AttentionInterface`` (BERT, RoBERTa, CLIP,
    BridgeTower, ...). Others (ViLT, BLIP) are not changed by it; ``sclkern.fuse`` serves them. The result is that of
    ``attn_implementation="eager"``, causal masks included. Torch's attention computes calls with a causal mask or any
    other mask that differs between queries, and one warning says so; the op's eager path computes head dimensions that
    have no kernel. Attention maps (``output_attentions=True``) are computed with all scores in memory.

    Registering a name twice has no further effect. There are two differences: a query whose keys are all padding gets
    zeros; a float mask that has one row for all queries is read as padding (0 attends, below -5000 does not). That is
    checked where values may be read (on a CPU, or with ``SCLKERN_DEBUG=1``).

    Args:
        name: value of ``attn_implementation``.

    Raises:
        TypeError: name is not a string. UserError: transformers is not installed, or has an attention of this name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected a string")
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        remedy = "pip install 'transformers>=5'"
        raise UserError(f"register_attention: transformers cannot be imported ({error}); {remedy}") from error
    known = AttentionInterface()
    if not name or name == "eager" or (name in known and known[name] is not attention):
        raise UserError(f"name: got {name!r}, which transformers has already; expected another, such as 'sclkern'")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that Hugging Face models call.

    Args:
        module: the attention module of the model.
        query: (B, H, Lq, D).
        key: (B, H, Lk, D).
        value: (B, H, Lk, D).
        attention_mask: (B, 1, 1 or Lq, Lk), bool (True = attend) or float (added to the scores); None attends to all.
        dropout: dropout probability.
        scaling: factor of the scores; None = 1 / sqrt(D).
        **options: further arguments of the interface.

    Returns:
        The output (B, Lq, H, D), and the attention maps (B, H, Lq, Lk) if they were requested, otherwise None.
    """
    if options.get("output_attentions") or wants_maps(module):
        warn_once("attention maps are requested: computed with all scores in memory")
        return _with_maps(module, query, key, value, attention_mask, dropout, scaling)
    padding, reason = key_padding(attention_mask, query.shape[0], query.shape[2])
    unsupported = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if unsupported:
        reason = f"{unsupported[0]} is given"
    elif key.shape[1] != query.shape[1] or value.shape[-1] != query.shape[-1]:
        reason = "keys and queries differ in their number of heads, or values in their width"
    if reason is None:
        out: Any = ops.attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            key_padding_mask=padding,
            dropout_p=dropout,
            softmax_scale=scaling,
        )
        return out, None
    from transformers import AttentionInterface

    warn_once(f"{reason}: computed by torch's attention")
    # The mask holds causality. Modules also have a flag for it, but Hugging Face's eager attention ignores that.
    options["is_causal"] = False
    result: tuple[Tensor, Tensor | None] = AttentionInterface()["sdpa"](
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return result


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


def wants_maps(module: nn.Module) -> bool:
    """Whether the model around ``module`` was called with ``output_attentions=True`` (known after ``sclkern.fuse``)."""
    request = module.__dict__.get("_sclkern_maps")
    return request is not None and request.wanted


def warn_once(message: str) -> None:
    """Warn, once for each message; never while torch.compile traces."""
    if not torch.compiler.is_compiling():
        _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"sclkern: {message}", stacklevel=4)


def _with_maps(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if key.shape[1] != query.shape[1]:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    maps = scores.softmax(-1)
    maps = nn.functional.dropout(maps, dropout, module.training)
    return (maps @ value).transpose(1, 2).contiguous(), maps
