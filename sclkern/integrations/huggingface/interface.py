"""The attention function that Hugging Face models call, and its registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sclkern import ops
from sclkern.errors import UserError
from sclkern.integrations.huggingface.calls import call_of
from sclkern.integrations.huggingface.formulas import Formula, formula_of
from sclkern.integrations.huggingface.maps import find_collector, maps_of
from sclkern.integrations.huggingface.masks import added, causal, key_padding, mask
from sclkern.integrations.huggingface.warn import warn_once

# Keywords of the interface that tell other implementations what the mask tells already, or that concern no attention.
HARMLESS = (
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "is_causal", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "position_embeddings", "position_ids",
    "return_dict", "sliding_window", "use_cache",
)  # fmt: skip
# A keyword whose value eager functions add to the scores.
BIAS = "position_bias"
# Keywords of which eager functions read their own form.
_READ_BY_EAGER = {BIAS, "s_aux", "sinks", "softcap"}
# Hugging Face's function for torch's attention, set by ``register_attention``: torch.compile traces no import.
_torch_attention: Any = None


def register_attention(name: str = "sclkern") -> None:
    """Register ``sclkern.ops.attention`` with ``transformers`` as ``attn_implementation=name``.

    It serves models that take their attention from ``transformers.AttentionInterface`` (BERT, RoBERTa, CLIP,
    BridgeTower, ...). Others (ViLT, BLIP) are not changed by it; ``sclkern.fuse`` serves them. The result is that of
    ``attn_implementation="eager"``. The op computes calls without a mask and with padding, with a position bias (T5's
    encoder) and with one that is part of the mask, where it has a gradient (BEiT's); torch's attention computes causal
    and other masks that differ between queries; the module's own eager function computes attention maps
    (``output_attentions=True``), a position bias beside such a mask, and everything beyond softmax(query key^T * scale
    + bias + mask) value: capped scores, attention sinks. One warning names each.

    Registering a name twice has no further effect. There are two differences: a query whose keys are all padding gets
    zeros, and a mask of bool means True = attend, where eager attention adds it as numbers. Padding is what is known to
    be padding: bool masks, those that transformers makes for this implementation, and float masks whose values are 0 or
    below -5000. Values are read once for each mask, and never under torch.compile or in a CUDA graph, where torch's
    attention computes masks of a model's own making.

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
    global _torch_attention
    _torch_attention = known["sdpa"]
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    find_collector()


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
        attention_mask: (B, 1, 1 or Lq, Lk), bool (True = attend) or float (added to the scores); None attends to all,
            or causally where the model leaves that to its implementation.
        dropout: dropout probability.
        scaling: factor of the scores; None = the module's default.
        **options: further arguments of the interface.

    Returns:
        The output (B, Lq, H, D), and the attention maps (B, H, Lq, Lk) if they were requested, otherwise None.

    Raises:
        UserError: the module computes something that only an implementation of transformers can.
    """
    formula, keys = formula_of(type(module)), key.shape[2]
    if not formula.masked:
        attention_mask = None
    elif formula.sliced and attention_mask is not None and attention_mask.shape[-1] > keys:
        attention_mask = attention_mask[..., :keys]
    if attention_mask is not None and not _is_usual(attention_mask, query.dtype) and _chosen(module) != "sdpa":
        # Eager attention adds them to the scores.
        attention_mask = attention_mask.to(query.dtype)
    is_causal = attention_mask is None and query.shape[2] > 1 and _wants_causality(module, options)
    bias, maps = _bias(formula, query, key, options), maps_of(module, options)
    beyond = find_obstacle(formula, query, key, attention_mask, options, bias)
    padding, reason = None, None
    if not maps and beyond is None:
        learned = attention_mask if bias is None and _is_bias(attention_mask, query, key) else None
        padding, reason = _padding(query, key, value, attention_mask if learned is None else None, is_causal)
        if reason is not None and bias is not None:
            beyond = f"a position bias beside {reason}"
        elif reason is None and learned is not None:
            bias = learned
    if maps or beyond is not None:
        warn_once(f"{beyond or 'attention maps are requested'}: computed by the eager attention of the model")
        function = _eager(module, formula, options)
        if is_causal:
            attention_mask = causal(query.shape[2], keys, query.device)
        given = None if attention_mask is None else added(attention_mask, query.dtype)
        out, weights = function(module, query, key, value, given, dropout=dropout, scaling=scaling, **options)
        return out, weights if maps else None
    scaling = formula.resolve_scale(module, scaling)
    dropout = dropout if module.training else 0.0
    if reason is None:
        heads_last = (tensor.transpose(1, 2) for tensor in (query, key, value))
        numbers: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": scaling}
        fused: Any = ops.attention(*heads_last, key_padding_mask=padding, bias=bias, **numbers)
        return fused.contiguous(), None
    warn_once(f"{reason}: computed by torch's attention")
    result: tuple[Tensor, Tensor | None] = _torch_attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal
    )
    return result


def _padding(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor | None, str | None]:
    """The key padding mask of the op, and the reason why the op does not compute a call, or None."""
    padding, reason = key_padding(attention_mask, query.shape[0], query.shape[2])
    if is_causal:
        reason = "causal attention"
    elif padding is not None and padding.shape[-1] != key.shape[2]:
        reason = "a mask for another number of keys"
    elif key.shape[0] != query.shape[0] or key.shape[1] != query.shape[1] or value.shape[-1] != query.shape[-1]:
        reason = "keys and queries differ in their number of heads or sequences, or values in their width"
    return padding, reason


def _bias(formula: Formula, query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor | None:
    """The position bias of a call, where the op can add it; None where there is none, or another one."""
    bias = options.get(BIAS) if BIAS in formula.extras else None
    return bias if _has_scores_shape(bias, query, key) else None


def _is_bias(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether a mask is a bias that is learned; torch's attention is as good for one without a gradient."""
    learned = attention_mask is not None and attention_mask.requires_grad
    return learned and _has_scores_shape(attention_mask, query, key)


def _has_scores_shape(bias: Any, query: Tensor, key: Tensor) -> bool:
    """Whether it is a bias as ``ops.attention`` takes it: (B or 1, H or 1, Lq, Lk)."""
    if not isinstance(bias, Tensor) or bias.ndim != 4 or query.ndim != 4:
        return False
    if bias.dtype not in (query.dtype, torch.float32):
        return False
    batch, heads, queries, _ = query.shape
    fits = bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
    return fits and tuple(bias.shape[2:]) == (queries, key.shape[2])


def _chosen(module: nn.Module) -> str | None:
    """The implementation that the model has chosen."""
    own: str | None = getattr(getattr(module, "config", None), "_attn_implementation_internal", None)
    return own


def _is_usual(attention_mask: Tensor, dtype: torch.dtype) -> bool:
    """Whether a mask is bool, or float and no narrower than the scores; torch's attention takes no other."""
    narrower = attention_mask.dtype != dtype and torch.promote_types(attention_mask.dtype, dtype) == dtype
    return attention_mask.dtype == torch.bool or (attention_mask.is_floating_point() and not narrower)


def _wants_causality(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether attention without a mask is causal, as the implementation decides that the model has chosen."""
    own, wanted = _chosen(module), options.get("is_causal")
    if own == "sdpa":
        return bool(getattr(module, "is_causal", True) if wanted is None else wanted)
    # Eager attention has a mask wherever it is causal, and ignores what a fused model tells its implementation.
    return own not in ("eager", None) and bool(wanted)


def find_obstacle(
    formula: Formula,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
    bias: Tensor | None = None,
) -> str | None:
    """The reason why the module's own function must compute a call.

    Args:
        formula: what the module's own function computes.
        query: of the call.
        key: of the call.
        attention_mask: of the call.
        options: further arguments of the call.
        bias: the position bias among them that the op adds, or None.

    Returns:
        The reason, such as "attention sinks"; None where it is softmax(query key^T * scale + bias + mask) value.
    """
    if formula.beyond is not None:
        return formula.beyond
    if query.ndim != 4 or query.dtype != key.dtype or (attention_mask is not None and attention_mask.ndim != 4):
        return "queries or a mask of other than four dimensions, or keys of another dtype"
    return next((f"{name} is given" for name in _unknown(options) if name != BIAS or bias is None), None)


def _unknown(options: dict[str, Any]) -> list[str]:
    given = [name for name, value in options.items() if value is not None and value is not False]
    return [name for name in given if name not in HARMLESS]


def _eager(module: nn.Module, formula: Formula, options: dict[str, Any]) -> Callable[..., Any]:
    """The eager function of a module; raises UserError where that computes something else than the module wants."""
    name, remedy = type(module).__name__, 'make the model with attn_implementation="eager"'
    function = formula.find_function()
    if function is None:
        raise UserError(f"attn_implementation: {name} has no eager attention that sclkern could call; {remedy}")
    unknown = [given for given in _unknown(options) if given not in _READ_BY_EAGER]
    # DeepSeek's attention masks what its indexer leaves out for "eager" and "sdpa", and tells others which keys remain.
    if unknown and not _only_looks_up(type(module)):
        raise UserError(
            f"attn_implementation: {name} leaves to implementations that are not transformers' own what its eager "
            f"attention does not do ({unknown[0]} is given); {remedy}"
        )
    return function


def _only_looks_up(cls: type[nn.Module]) -> bool:
    call = call_of(cls)  # type: ignore[arg-type]
    return call is None or call.looked_up
