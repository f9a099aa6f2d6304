"""Fused attention for Hugging Face's models: ``attn_implementation="sclkern"``."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn

from sclkern import ops
from sclkern.errors import UserError
from sclkern.ops.dispatch import may_read

# What a mask adds to a score it forbids is the smallest number of its dtype, or -10000 in older models.
FORBIDDEN = -5000.0
# Arguments of Hugging Face's attention functions that change what is computed, and that the fused op does not have.
_UNSUPPORTED = ("position_bias", "softcap", "s_aux", "sliding_window", "head_mask", "cache")


def register_attention(name: str = "sclkern") -> None:
    """Make ``attn_implementation=name`` known to ``transformers``: ``sclkern.ops.attention`` for its encoders.

    For models that take their attention from ``transformers.AttentionInterface`` (BERT, RoBERTa, CLIP, BridgeTower
    ...); those that do not (ViLT, BLIP) are not changed by it, ``sclkern.fuse`` serves them. The result is that of
    ``attn_implementation="eager"``, causal masks included. Causal masks, and others that differ between queries, are
    left to torch's attention, which one warning tells; head dimensions without kernels are left to the op's eager path.
    Attention maps (``output_attentions=True``) are computed with all scores in memory.

    Registered again, it is the same. Differences: a query whose keys are all padding gets zeros; a float mask with one
    row for all queries is taken as padding (0 attends, below -5000 does not), which is checked where values may be read
    (on a CPU, or with ``SCLKERN_DEBUG=1``).

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
    **options,
) -> tuple[Tensor, Tensor | None]:
    """What Hugging Face's models call. query: (B, H, Lq, D). key, value: (B, H, Lk, D). attention_mask: (B, 1, 1 or Lq,
    Lk). Returns (B, Lq, H, D) and None, or the maps (B, H, Lq, Lk) where they are asked for."""
    if options.get("output_attentions") or wants_maps(module):
        tell("attention maps are asked for: computed with all scores in memory")
        return _with_maps(module, query, key, value, attention_mask, dropout, scaling)
    padding, reason = key_padding(attention_mask, query.shape[0], query.shape[2])
    given = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if given:
        reason = f"{given[0]} is given"
    elif key.shape[1] != query.shape[1] or value.shape[-1] != query.shape[-1]:
        reason = "keys have other heads than queries, or values another width"
    if reason is None:
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return ops.attention(*tensors, key_padding_mask=padding, dropout_p=dropout, softmax_scale=scaling), None
    from transformers import AttentionInterface

    tell(f"{reason}: left to torch's attention")
    # Causality is in the mask: the flags of modules are heeded by no eager attention either.
    options["is_causal"] = False
    return AttentionInterface()["sdpa"](
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )


def mask(*args, **options) -> Tensor | None:
    """What makes the masks of Hugging Face's models: a float mask to be added, of one row for all queries where only
    padding is masked: (B, 1, 1, Lk), else what their eager attention has: (B, 1, Lq, Lk)."""
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    padding = options.get("attention_mask")
    plain = options.get("mask_function") is bidirectional_mask_function and not args
    if not plain or options.get("kv_offset", 0) or (padding is not None and padding.ndim != 2):
        # Without a mask a causal model could not be told from an encoder.
        return eager_mask(*args, **options)
    if padding is None:
        return None
    if padding.shape[-1] != options["kv_length"]:
        return eager_mask(*args, **options)
    if may_read(padding) and bool(padding.all()):
        return None
    dtype = options.get("dtype", torch.float32)
    added = torch.zeros(padding.shape, dtype=dtype, device=padding.device)
    return added.masked_fill(~padding.bool(), torch.finfo(dtype).min)[:, None, None, :]


def key_padding(attention_mask: Tensor | None, batch: int, queries: int) -> tuple[Tensor | None, str | None]:
    """The mask as ``ops.attention`` takes it, (B, Lk) bool, True = attend, or None; and why it cannot be one, or None.

    Args:
        attention_mask: (B or 1, 1, Lq or 1, Lk), bool or to be added. batch: B. queries: Lq.
    """
    if attention_mask is None:
        return None, None
    if attention_mask.ndim != 4 or attention_mask.shape[1] != 1:
        return None, f"a mask of shape {tuple(attention_mask.shape)}"
    if attention_mask.shape[2] != 1 and queries != 1 and attention_mask.stride(2) != 0:
        return None, "a mask that may differ between queries, as a causal one does"
    row = attention_mask[:, 0, 0].expand(batch, -1)
    if row.dtype == torch.bool:
        return row, None
    attend = row > FORBIDDEN
    if may_read(row) and bool((attend & (row != 0)).any()):
        return None, "a mask that adds other numbers than 0"
    return attend, None


def wants_maps(module: nn.Module) -> bool:
    """Whether the model that ``module`` is part of was called with ``output_attentions=True`` (see ``fuse``)."""
    maps = module.__dict__.get("_sclkern_maps")
    return maps is not None and maps.wanted


def tell(what: str) -> None:
    """Warn, once for each text."""
    if not torch.compiler.is_compiling():
        _tell(what)


@functools.cache
def _tell(what: str) -> None:
    warnings.warn(f"sclkern: {what}", stacklevel=4)


def _with_maps(module, query, key, value, attention_mask, dropout, scaling):
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
