"""PyTorch's own implementations: attention with every SDPA backend forced by name, varlen attention, a convolution."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.implementations import DTYPES, Implementation, UnsupportedError
from sclkern import reference

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _sdpa(backend: str, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """Attention of (B, L, H, D) tensors with one backend.

    Raises:
        UnsupportedError: the backend cannot compute it, with the reason that torch gives.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with warnings.catch_warnings(record=True) as reported, sdpa_kernel(BACKENDS[backend]):
        warnings.simplefilter("always")
        try:
            return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
        except RuntimeError as error:
            reasons = [str(warning.message).split(" (Triggered")[0] for warning in reported]
            # The first warnings only announce that a kernel is not used because of what follows.
            reasons = [reason for reason in reasons if "not used because" not in reason] or [str(error).split("\n")[0]]
            raise UnsupportedError(f"torch SDPA {backend}: {'; '.join(reasons)}") from error


def _attention(backend: str, inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    mask = inputs["key_padding_mask"]
    mask = inputs.get("bias") if mask is None else mask[:, None, None]
    return _sdpa(backend, inputs["query"], inputs["key"], inputs["value"], attn_mask=mask, dropout_p=dropout_p)


def _varlen(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    """torch's attention of packed sequences, by FlashAttention; it has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    packing = (inputs[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
    try:
        return varlen_attn(inputs["query"], inputs["key"], inputs["value"], *packing)
    except RuntimeError as error:
        raise UnsupportedError(f"torch varlen: {str(error).splitlines()[0]}") from error


@functools.lru_cache(maxsize=1)
def _frame_mask(frames: int, tokens: int, device: torch.device) -> Tensor:
    return reference.frame_attention_mask(frames, tokens, device)


def _frame_attention(backend: str, inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    query, frames = inputs["query"], inputs["num_frames"]
    mask = _frame_mask(frames, query.shape[1] // frames, query.device)
    return _sdpa(backend, query, inputs["key"], inputs["value"], attn_mask=mask)


def _cross_attention(backend: str, inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    x, context, mask, heads = inputs["x"], inputs["context"], inputs.get("key_padding_mask"), inputs["num_heads"]
    width = x.shape[-1]
    query = F.linear(x, inputs["in_weight"][:width], inputs["in_bias"][:width])
    key, value = F.linear(context, inputs["in_weight"][width:], inputs["in_bias"][width:]).chunk(2, -1)
    query, key, value = (tensor.unflatten(-1, (heads, width // heads)) for tensor in (query, key, value))
    mask = None if mask is None else mask[:, None, None]
    out = _sdpa(backend, query, key, value, attn_mask=mask, dropout_p=dropout_p)
    return F.linear(out.flatten(2), inputs["out_weight"], inputs["out_bias"])


def _convolution(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    """All patches by a strided convolution, of which some are kept afterwards, as published models do."""
    images, weight, position, keep = inputs["images"][:, 0], inputs["weight"], inputs["position"], inputs.get("keep")
    width = len(weight)
    tokens = F.conv2d(images, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2) + position[1:]
    if keep is not None:
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, width))
    first = (inputs["cls"] + position[0]).expand(len(tokens), 1, -1)
    return F.layer_norm(torch.cat([first, tokens], 1), (width,), inputs["norm_weight"], inputs["norm_bias"])


def _by_backend(run: Callable[..., Tensor]) -> tuple[Implementation, ...]:
    return tuple(Implementation(f"sdpa-{backend}", functools.partial(run, backend)) for backend in BACKENDS)


TORCH_BASELINES: dict[str, tuple[Implementation, ...]] = {
    "attention": _by_backend(_attention),
    "packed_attention": (Implementation("varlen", _varlen, dropout=False, dtypes=DTYPES[:2]),),
    "frame_attention": _by_backend(_frame_attention),
    "cross_attention": _by_backend(_cross_attention),
    "embed_patches": (Implementation("convolution", _convolution),),
}
