"""The attention function that Hugging Face models call, and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sclkern import ops
from sclkern.errors import UserError
from sclkern.integrations.huggingface.maps import wants_maps
from sclkern.integrations.huggingface.masks import key_padding, mask
from sclkern.integrations.huggingface.warn import warn_once

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
