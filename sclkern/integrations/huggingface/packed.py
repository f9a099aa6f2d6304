"""Attention of packed sequences: that of vision models which tell implementations with "flash" in their name the ends.

Qwen-VL and its relatives put the images and windows of a batch into one sequence. To implementations whose name
contains "flash" they pass that as it is, with ``cu_seqlens``; for all others they split it, and call attention for each
piece. Modules whose forward does that, and nothing else with the name, get ours under a name with "flash" in it. No
model sees this name: the module alone has a configuration that says it, and masks are made by the models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sclkern import ops
from sclkern.integrations.huggingface.formulas import formula_of
from sclkern.integrations.huggingface.interface import attention, find_obstacle
from sclkern.integrations.huggingface.maps import maps_of
from sclkern.integrations.huggingface.masks import mask
from sclkern.integrations.huggingface.warn import warn_once
from sclkern.integrations.source import forward_digest, known
from sclkern.ops.packed_attention import plan

NAME = "sclkern_flash"
# What the forward does with the maps of the pieces, by its form in ``known.json``: nothing, or it returns their list.
_LISTED = "packed attention with maps"
_FORMS = ("packed attention", _LISTED)
_forms: dict[type[nn.Module], str | None] = {}


def register_packed_attention() -> None:
    """Register ``packed_attention`` with transformers as ``NAME``; registering it twice has no further effect."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, mask)


def packs(module: Any) -> bool:
    """Whether a module passes packed sequences to an implementation whose name contains "flash".

    Args:
        module: an attention module that takes its attention from ``transformers.AttentionInterface``.

    Returns:
        True where the text of its forward was examined.
    """
    replaced = module.__dict__.get("forward")
    # transformers 5.0 keeps the forward that it found on each instance, after a call that collects attention maps.
    if replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward:
        return False
    asks = getattr(inspect.unwrap(type(module).forward), "__globals__", {}).get("is_flash_attention_requested")
    return _form_of(type(module)) is not None and _means_flash(asks)


def _means_flash(asks: Callable[..., bool] | None) -> bool:
    """Whether the function by which forwards ask for the name takes ours for one of "flash", and torch's for none."""
    if asks is None:
        return False
    names = (NAME, "sdpa", "eager")
    return [asks(requested_attention_implementation=name) for name in names] == [True, False, False]


def _form_of(cls: type[nn.Module]) -> str | None:
    if cls not in _forms:
        form = known("forwards").get(forward_digest(cls) or "", {}).get("form")
        _forms[cls] = form if form in _FORMS else None
    return _forms[cls]


# How the sequences are split, and which path the op takes, depends on values.
@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The attention function that modules of packed sequences call: each sequence attends to itself.

    ``ops.packed_attention`` computes all at once, on kernels or, on a CPU, by PyTorch's attention. Calls that it does
    not take are split as the module itself splits them for other implementations, and go to ``attention``. Under
    torch.compile it runs between two graphs.

    Args:
        module: the attention module of the model.
        query: (1, H, T, D).
        key: (1, H, T, D).
        value: (1, H, T, D).
        attention_mask: passed to the attention of each sequence.
        dropout: dropout probability.
        scaling: factor of the scores; None = the module's default.
        cu_seq_lens_q: (B + 1,) integers: 0, then the end of each sequence; None = nothing is packed.
        cu_seq_lens_k: the same.
        max_length_q: not read: a length that is too small would leave tokens out.
        max_length_k: the same.
        **options: further arguments of the interface.

    Returns:
        The output (1, T, H, D), and what the forward returns as maps: None, or a list with one entry for each sequence.
    """
    call: dict[str, Any] = {"dropout": dropout, "scaling": scaling, **options}
    form, ends = _form_of(type(module)), cu_seq_lens_q
    if form is None or ends is None or cu_seq_lens_k is not ends:
        # Nobody whose forward was examined calls it so; here the mask tells what is packed.
        call |= {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        return attention(module, query, key, value, attention_mask, **call)
    listed = form == _LISTED
    if listed and maps_of(module, options):
        return _one_by_one(module, (query, key, value), attention_mask, ends, call, listed)
    scale = formula_of(type(module)).resolve_scale(module, scaling)
    dropout = dropout if module.training else 0.0
    reason = _obstacle(module, (query, key, value), attention_mask, ends, options)
    if reason is None:
        # The ends are right whatever a caller of the model has computed; on a GPU, reading them waits for it.
        longest = int((ends[1:] - ends[:-1]).max())
        packing: tuple[Any, ...] = (ends.to(torch.int32), ends.to(torch.int32), longest, longest)
        packed: list[Any] = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        choice = plan(*packed, *packing, dropout_p=dropout, softmax_scale=scale)
        if choice.path in ("triton", "grouped"):
            fused: Any = ops.packed_attention(*packed, *packing, dropout_p=dropout, softmax_scale=scale)
            return fused.unsqueeze(0).contiguous(), [None] * (len(ends) - 1) if listed else None
        reason = choice.reasons[0]
    warn_once(f"{reason}: packed sequences are computed one by one")
    return _one_by_one(module, (query, key, value), attention_mask, ends, call, listed)


def _obstacle(
    module: nn.Module, tensors: tuple[Tensor, ...], attention_mask: Tensor | None, ends: Tensor, options: dict[str, Any]
) -> str | None:
    """The reason why ``ops.packed_attention`` does not compute this call, or None."""
    query = tensors[0]
    reason = find_obstacle(formula_of(type(module)), query, tensors[1], attention_mask, options)
    if reason is not None:
        return reason
    if attention_mask is not None:
        return "a mask beside packed sequences"
    if len(ends) < 2:
        return "no sequences"
    if any(tensor.shape != query.shape or tensor.dtype != query.dtype for tensor in tensors) or query.shape[0] != 1:
        return "several rows of packed sequences, or keys and queries of different shapes"
    if ends.device.type == "cpu" and ends[-1:].tolist() != [query.shape[2]]:
        # The module's own way raises an error.
        return "ends that do not cover the sequence"
    return None


def _one_by_one(
    module: nn.Module,
    tensors: tuple[Tensor, ...],
    attention_mask: Tensor | None,
    ends: Tensor,
    call: dict[str, Any],
    listed: bool,
) -> tuple[Tensor, Any]:
    lengths = (ends[1:] - ends[:-1]).tolist()
    pieces = zip(*(torch.split(tensor, lengths, dim=2) for tensor in tensors), strict=True)
    outs: list[Tensor] = []
    maps: list[Tensor | None] = []
    for query, key, value in pieces:
        out, weights = attention(module, query, key, value, attention_mask, **call)
        outs.append(out)
        maps.append(weights)
    return torch.cat(outs, 1), maps if listed else None
