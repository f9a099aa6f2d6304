"""Attention by flash-attn 2 (package ``flash_attn``), under the definitions of ``sclkern.reference``.

Its functions have no key padding mask, and leave what lies behind the last sequence as it was allocated. Both are made
up for here, without reading a length back.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sclkern.libraries._lookup import Found, constant

# What it computes on and in; tests of stand-ins add others.
DEVICE_TYPES = {"cuda"}
DTYPES = {torch.float16, torch.bfloat16}
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)
REMEDY = "install flash-attn 2.8 or later (the extra flash)"
_COMMON = ("q", "k", "v", "dropout_p", "softmax_scale", "deterministic")
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
FUNCTION = Found("flash-attn", "flash_attn", "flash_attn_func", _COMMON, REMEDY)
VARLEN_FUNCTION = Found("flash-attn", "flash_attn", "flash_attn_varlen_func", (*_COMMON, *_LENGTHS), REMEDY)


def version() -> str:
    """Of the library that was found."""
    return str(getattr(sys.modules["flash_attn"], "__version__", "of unknown version"))


# torch.compile can trace neither an import nor a question to the driver.
@constant
def missing() -> str | None:
    """Why the library cannot be used on any device, with the remedy; None if it can."""
    return FUNCTION.problem() or VARLEN_FUNCTION.problem()


@constant
def _older(device: torch.device) -> str | None:
    """The name of a GPU on which the library does not run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= MIN_CAPABILITY:
        return None
    return torch.cuda.get_device_name(device)


def problems(
    device: torch.device, dtype: torch.dtype | None = None, head_dim: int = 64, dropout_p: float = 0.0,
    softmax_scale: float | None = None, seed: int | Tensor | None = None, dropout_ids: Tensor | None = None,
    return_lse: bool = False, bias: Tensor | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """Why flash-attn cannot compute attention here.

    Args:
        device: of the tensors.
        dtype: of query, key and value; None if it is not known.
        head_dim: D.
        dropout_p: dropout probability.
        softmax_scale: factor of the scores; None is the default.
        seed: of the dropout mask.
        dropout_ids: of the dropout mask.
        return_lse: whether the log-sum-exp is wanted.
        bias: of the scores, or None.

    Returns:
        Each reason with what is expected; none if it can.
    """
    found = [] if (absent := missing()) is None else [absent]
    if device.type not in DEVICE_TYPES:
        found.append(f"tensors on {device}, flash-attn needs a CUDA GPU")
    elif (old := _older(device)) is not None:
        found.append(f"{old} is older than Ampere, which flash-attn needs")
    if dtype is not None and dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found.append(f"{name} tensors, flash-attn computes float16 and bfloat16: cast them, or use autocast")
    if head_dim > MAX_HEAD_DIM:
        found.append(f"head dim {head_dim}, flash-attn computes at most {MAX_HEAD_DIM}")
    if not dropout_p < 1:
        found.append(f"dropout_p {dropout_p}, flash-attn expects it below 1")
    if softmax_scale is not None and not softmax_scale > 0:
        # It scales the maximum of the scores, not each of them.
        found.append(f"softmax_scale {softmax_scale}, flash-attn expects it above 0")
    if dropout_p > 0 and not (seed is None and dropout_ids is None):
        found.append("seed or dropout_ids, whose dropout mask flash-attn cannot draw: leave them out")
    if return_lse:
        found.append("return_lse, which flash-attn has for tests only: leave it out")
    if bias is not None:
        found.append("bias, which flash-attn does not add: leave backend out")
    return tuple(found)


def require(device: torch.device, *call: Any) -> None:
    """Raise a ``ValueError`` with every reason why flash-attn cannot compute attention here.

    Args:
        device: of the tensors.
        *call: the other arguments of ``problems``.
    """
    if found := problems(device, *call):
        raise ValueError(f"backend='flash': cannot run: {'; '.join(found)}")


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """``reference.attention``, dropout drawn by the library from torch's generator.

    Args:
        query: (B, Lq, H, D), B and Lq at least 1.
        key: (B, Lk, H, D), Lk at least 1.
        value: as key.
        mask: (B, Lk) bool, True = attend, or None.
        scale: factor of the scores.
        dropout_p: dropout probability.

    Returns:
        (B, Lq, H, D).
    """
    if mask is None:
        out: Tensor = FUNCTION.call(query, key, value, **_options(dropout_p, scale))
        return out
    batch, num_queries = query.shape[:2]
    ends = mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * num_queries
    # Keys that are attended to come first, sample after sample; the others lie behind the last end.
    order = (~mask.flatten()).to(torch.uint8).argsort(stable=True)
    key, value = (tensor.flatten(0, 1).index_select(0, order) for tensor in (key, value))
    lengths = cu_seqlens_q, F.pad(ends, (1, 0)), num_queries, mask.shape[1]
    out = packed_attention(query.flatten(0, 1), key, value, *lengths, dropout_p, scale, query_tail=False)
    return out.unflatten(0, (batch, num_queries))


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, scale: float, *, query_tail: bool = True, key_tail: bool = True,
) -> Tensor:  # fmt: skip
    """``reference.packed_attention``, dropout drawn by the library from torch's generator.

    Args:
        query: (Tq, H, D).
        key: (Tk, H, D).
        value: as key.
        cu_seqlens_q: (B + 1,) int32, contiguous, B at least 1.
        cu_seqlens_k: likewise.
        max_seqlen_q: upper bound of the query lengths, at least 1.
        max_seqlen_k: upper bound of the key lengths, at least 1.
        dropout_p: dropout probability.
        scale: factor of the scores.
        query_tail: whether there may be queries behind the last sequence. They get zeros, for three more passes over
            memory in each direction.
        key_tail: likewise of keys.

    Returns:
        (Tq, H, D).
    """
    behind_queries = _behind(query, cu_seqlens_q) if query_tail else None
    behind_keys = _behind(key, cu_seqlens_k) if key_tail else None
    # The library allocates gradients and does not fill those of tokens behind the last sequence.
    query, key, value = _zeroed(query, behind_queries), _zeroed(key, behind_keys), _zeroed(value, behind_keys)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    named = dict(zip(_LENGTHS, lengths, strict=True))
    out = VARLEN_FUNCTION.call(query, key, value, **named, **_options(dropout_p, scale))
    return _zeroed(out, behind_queries)


def _options(dropout_p: float, scale: float) -> dict[str, Any]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return {"dropout_p": float(dropout_p), "softmax_scale": scale, "deterministic": deterministic}


def _behind(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T, 1, 1) bool, True behind the last sequence."""
    return (torch.arange(tokens.shape[0], device=tokens.device) >= cu_seqlens[-1])[:, None, None]


def _zeroed(tokens: Tensor, where: Tensor | None) -> Tensor:
    return tokens if where is None else tokens.masked_fill(where, 0.0)
