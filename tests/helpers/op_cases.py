"""Every op with small inputs: the table that the tests of what holds for all of them run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from op_testing import DEVICE


@dataclass(frozen=True)
class Case:
    """``arguments`` by keyword for a length, that of the dimension that differs from step to step; ``parameters`` are
    those that stay float32 beside half-precision features; floating arguments in ``frozen`` get no gradient;
    ``dropout``: the op takes ``dropout_p`` and ``seed``."""

    arguments: Callable[[int], dict[str, Any]]
    parameters: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    dropout: bool = False


def features(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def ragged(rows: int, width: int) -> Tensor:
    """(rows, width) bool: all columns of the first row, ever fewer of the others."""
    return torch.arange(width, device=DEVICE) < width - torch.arange(rows, device=DEVICE)[:, None]


def _attention(length: int) -> dict[str, Any]:
    tensors = {"query": features(2, length, 1, 32), "key": features(2, 5, 1, 32), "value": features(2, 5, 1, 32)}
    return tensors | {"key_padding_mask": ragged(2, 5)}


def _bias_gelu(length: int) -> dict[str, Any]:
    return {"x": features(length, 24), "bias": features(24)}


def _completion_loss(length: int) -> dict[str, Any]:
    tensors = {"recovered": features(length, 16), "complete": features(length, 16)}
    return tensors | {"temperature": torch.tensor(0.5, device=DEVICE)}


def _dropout_add_layer_norm(length: int) -> dict[str, Any]:
    parameters = {"weight": features(24), "bias": features(24), "x_bias": features(24)}
    return {"x": features(length, 24), "residual": features(length, 24)} | parameters


def _frame_attention(length: int) -> dict[str, Any]:
    tensors = {name: features(1, 3 * length, 1, 32) for name in ("query", "key", "value")}
    return tensors | {"num_frames": 3}


def _linear_cross_entropy(length: int) -> dict[str, Any]:
    labels = torch.arange(length, device=DEVICE) % 11
    labels[1] = -100
    return {"hidden": features(length, 16), "weight": features(11, 16), "bias": features(11), "labels": labels}


def _cross_attention(length: int) -> dict[str, Any]:
    tensors = {"x": features(2, length, 64), "context": features(2, 5, 64)}
    weights = {"in_weight": features(192, 64) / 8, "in_bias": features(192), "out_weight": features(64, 64) / 8}
    return tensors | weights | {"out_bias": features(64), "num_heads": 2, "key_padding_mask": ragged(2, 5)}


def _embed_patches(length: int) -> dict[str, Any]:
    # Two frames of four patches of 4 x 4 pixels, three of them kept.
    keep = torch.tensor([0, 2, 3], device=DEVICE).expand(length, -1)
    tensors = {"images": features(length, 2, 3, 8, 8), "weight": features(24, 3, 4, 4) / 7, "position": features(5, 24)}
    tensors |= {"cls": features(24), "temporal": features(2, 24), "keep": keep}
    tensors["replace"] = (torch.arange(4, device=DEVICE) % 2 == 0).expand(length, -1)
    return tensors | {name: features(24) for name in ("mask_token", "norm_weight", "norm_bias")}


def _packed_attention(length: int) -> dict[str, Any]:
    tensors = {"query": features(length, 1, 32), "key": features(5, 1, 32), "value": features(5, 1, 32)}
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32, device=DEVICE) for ends in ([0, 2, length], [0, 3, 5]))
    lengths = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": length, "max_seqlen_k": 3}
    return tensors | lengths


def _mask_text(length: int) -> dict[str, Any]:
    ids = torch.randint(3, 49, (2, length)).to(DEVICE)
    options = {"kind": "mlm", "ratio": 0.3, "mask_id": 49, "vocab_size": 50, "seed": _seed()}
    return {"ids": ids, "lengths": torch.tensor([length, length - 1], device=DEVICE)} | options


def _select_patches(length: int) -> dict[str, Any]:
    return {"num_patches": 9, "keep_ratio": 0.5, "batch": length, "seed": _seed(), "device": DEVICE}


def _select_tokens(length: int) -> dict[str, Any]:
    return {"num_patches": 9, "ratio": 0.5, "batch": length, "seed": _seed(), "device": DEVICE}


def _seed() -> Tensor:
    return torch.tensor([7], device=DEVICE)


_PROJECTIONS = ("in_weight", "in_bias", "out_weight", "out_bias")
_EMBEDDINGS = ("weight", "position", "cls", "temporal", "mask_token", "norm_weight", "norm_bias")
CASES = {
    "attention": Case(_attention, dropout=True),
    "bias_gelu": Case(_bias_gelu, parameters=("bias",)),
    "completion_loss": Case(_completion_loss, parameters=("temperature",)),
    "cross_attention": Case(_cross_attention, parameters=_PROJECTIONS, dropout=True),
    "dropout_add_layer_norm": Case(_dropout_add_layer_norm, parameters=("weight", "bias", "x_bias"), dropout=True),
    "embed_patches": Case(_embed_patches, parameters=_EMBEDDINGS, frozen=("images",)),
    "frame_attention": Case(_frame_attention),
    "linear_cross_entropy": Case(_linear_cross_entropy, parameters=("weight", "bias")),
    "mask_text": Case(_mask_text),
    "packed_attention": Case(_packed_attention, dropout=True),
    "select_patches": Case(_select_patches),
    "select_tokens": Case(_select_tokens),
}
