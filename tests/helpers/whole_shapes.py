"""The ops that differentiate at the shapes of the workload: images of 288 px, captions of 13 tokens on average and at
most 50, clips of four frames, 12 heads of 64 channels, width 768, a vocabulary of 50,265."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from op_cases import CASES
from torch import Tensor

from op_testing import DEVICE
from sclkern import ops

IMAGE, TEXT, WORDS, HEADS, CHANNELS, WIDTH = 325, 50, 13, 12, 64, 768
SEED = 2**40 + 5


@dataclass(frozen=True)
class WholeShape:
    """``arguments``: by keyword, floating tensors float32; ``kernel``: further options of the op's kernel;
    ``precise``: names that stay float32 beside half precision; ``largest``: of the numbers that float32 holds on the
    way to the output (scores, logits), for inputs of this kind."""

    op: str
    arguments: Callable[[], dict[str, Any]]
    kernel: dict[str, Any] = field(default_factory=dict)
    precise: tuple[str, ...] = ()
    largest: float = 1.0


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=DEVICE) * scale


def lengths(rows: int, longest: int) -> Tensor:
    """(rows,) int64: captions of 8 to 18 tokens, one of them as long as any."""
    drawn = torch.randint(8, min(19, longest + 1), (rows,), device=DEVICE)
    return torch.where(torch.arange(rows, device=DEVICE) == 0, longest, drawn)


def attention(batch: int, queries: int, keys: int, *, padded: bool, heads: int = HEADS, channels: int = CHANNELS):
    shapes = {"query": queries, "key": keys, "value": keys}
    tensors = {name: normal(batch, length, heads, channels) for name, length in shapes.items()}
    mask = torch.arange(keys, device=DEVICE) < lengths(batch, keys)[:, None] if padded else None
    return tensors | {"key_padding_mask": mask, "dropout_p": 0.1, "seed": torch.tensor([SEED], device=DEVICE)}


def packed_attention(batch: int, queries: int, keys: int, *, heads: int = HEADS, channels: int = CHANNELS):
    """Queries of one length, keys of the lengths of captions (or of the same length, if they are as many)."""
    counts = torch.full((batch,), queries, device=DEVICE)
    ends = [n.cumsum(0) for n in (counts, counts if keys == queries else lengths(batch, keys))]
    cu_q, cu_k = (torch.cat([n.new_zeros(1), n]).int() for n in ends)
    shapes = {"query": int(ends[0][-1]), "key": int(ends[1][-1]), "value": int(ends[1][-1])}
    tensors = {name: normal(tokens, heads, channels) for name, tokens in shapes.items()}
    tensors |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": queries, "max_seqlen_k": keys}
    return tensors | {"dropout_p": 0.1, "seed": torch.tensor([SEED], device=DEVICE)}


def frame_attention(batch: int, frames: int, patches: int, *, heads: int = HEADS):
    shape = batch, frames * (1 + patches), heads, CHANNELS
    return {name: normal(*shape) for name in ("query", "key", "value")} | {"num_frames": frames}


def cross_attention(batch: int, queries: int, keys: int, *, width: int = WIDTH, heads: int = HEADS):
    # Scaled as trained weights are, so that scores stay within a few units.
    scale = width**-0.5
    tensors = {"x": normal(batch, queries, width), "context": normal(batch, keys, width)}
    tensors |= {"in_weight": normal(3 * width, width, scale=scale), "in_bias": normal(3 * width, scale=0.1)}
    tensors |= {"out_weight": normal(width, width, scale=scale), "out_bias": normal(width, scale=0.1)}
    mask = torch.arange(keys, device=DEVICE) < lengths(batch, keys)[:, None]
    return tensors | {"num_heads": heads, "key_padding_mask": mask}


def completion_loss(*shape: int):
    """Positives at a cosine of about 0.9: those of a model that has learned."""
    complete = normal(*shape)
    temperature = torch.tensor(0.03, device=DEVICE)
    return {"recovered": complete + normal(*shape, scale=0.5), "complete": complete, "temperature": temperature}


def linear_cross_entropy(rows: int, width: int = WIDTH, vocabulary: int = 50265):
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    labels[::7] = -100
    weights = {"weight": normal(vocabulary, width, scale=0.02), "bias": normal(vocabulary, scale=0.1)}
    return {"hidden": normal(rows, width)} | weights | {"labels": labels}


def dropout_add_layer_norm(rows: int, width: int = WIDTH):
    tensors = {"x": normal(rows, width), "residual": normal(rows, width)}
    tensors |= {name: normal(width) for name in ("weight", "bias", "x_bias")}
    return tensors | {"dropout_p": 0.1, "seed": torch.tensor([SEED], device=DEVICE)}


def add_layer_norm(rows: int, width: int = WIDTH):
    """Between two layers of the vision encoder."""
    tensors = {
        "x": normal(rows, width),
        "residual": normal(rows, width),
        "weight": normal(width),
        "bias": normal(width),
    }
    return tensors | {"return_sum": True}


def bias_gelu(rows: int, width: int, approximate: str):
    return {"x": normal(rows, width), "bias": normal(width), "approximate": approximate}


def embed_patches(batch: int, frames: int, side: int, *, keep: float | None = None, width: int = WIDTH):
    patches = (side // 16) ** 2
    seed = torch.tensor([SEED], device=DEVICE)
    tensors = {"images": normal(batch, frames, 3, side, side), "weight": normal(width, 3, 16, 16, scale=0.036)}
    tensors |= {"position": normal(1 + patches, width), "cls": normal(width)}
    tensors |= {name: normal(width) for name in ("norm_weight", "norm_bias")}
    tensors["temporal"] = normal(frames, width) if frames > 1 else None
    if keep is not None:
        tensors["keep"] = ops.select_patches(patches, keep, batch, seed=seed, device=DEVICE)
    else:
        tensors["replace"] = ops.select_tokens(patches, 0.3, batch, seed=seed, device=DEVICE)
        tensors["mask_token"] = normal(width)
    return tensors


SCORES = {"largest": 8.0}
WHOLE = {
    "attention 325x325": WholeShape("attention", lambda: attention(64, IMAGE, IMAGE, padded=False), **SCORES),
    "attention 325x13": WholeShape("attention", lambda: attention(64, IMAGE, WORDS, padded=True), **SCORES),
    "attention 325x50": WholeShape("attention", lambda: attention(64, IMAGE, TEXT, padded=True), **SCORES),
    "attention 13x325": WholeShape("attention", lambda: attention(64, WORDS, IMAGE, padded=False), **SCORES),
    "attention 65x65": WholeShape("attention", lambda: attention(64, 65, 65, padded=False), **SCORES),
    "attention 50x50": WholeShape("attention", lambda: attention(64, TEXT, TEXT, padded=True), **SCORES),
    "attention of 128 channels": WholeShape(
        "attention", lambda: attention(16, IMAGE, TEXT, padded=True, heads=6, channels=128), **SCORES
    ),
    "packed 325x18": WholeShape("packed_attention", lambda: packed_attention(64, IMAGE, 18), **SCORES),
    "packed 325x325": WholeShape("packed_attention", lambda: packed_attention(64, IMAGE, IMAGE), **SCORES),
    "frames 4x197": WholeShape("frame_attention", lambda: frame_attention(8, 4, 196), **SCORES),
    "cross 325x13": WholeShape(
        "cross_attention", lambda: cross_attention(64, IMAGE, WORDS), kernel={"absorb": "keys"}, **SCORES
    ),
    "cross 325x18": WholeShape(
        "cross_attention", lambda: cross_attention(64, IMAGE, 18), kernel={"absorb": "keys"}, **SCORES
    ),
    "completion 128": WholeShape(
        "completion_loss", lambda: completion_loss(128, WIDTH), precise=("temperature",), largest=34.0
    ),
    "completion 4096": WholeShape(
        "completion_loss", lambda: completion_loss(4096, WIDTH), precise=("temperature",), largest=34.0
    ),
    "completion of 4 frames": WholeShape(
        "completion_loss", lambda: completion_loss(4, 64, WIDTH), precise=("temperature",), largest=34.0
    ),
    "words 125": WholeShape("linear_cross_entropy", lambda: linear_cross_entropy(125), largest=8.0),
    "words 3200": WholeShape("linear_cross_entropy", lambda: linear_cross_entropy(3200), largest=8.0),
    "layer norm 20800": WholeShape("dropout_add_layer_norm", lambda: dropout_add_layer_norm(64 * IMAGE)),
    "sum and layer norm 20800": WholeShape(
        "dropout_add_layer_norm", lambda: add_layer_norm(64 * IMAGE), precise=("residual",)
    ),
    "gelu 20800": WholeShape("bias_gelu", lambda: bias_gelu(64 * IMAGE, 4 * WIDTH, "none")),
    "gelu tanh 20800": WholeShape("bias_gelu", lambda: bias_gelu(64 * IMAGE, 4 * WIDTH, "tanh")),
    "gelu quick 20800": WholeShape("bias_gelu", lambda: bias_gelu(64 * IMAGE, 4 * WIDTH, "quick")),
    "embed kept": WholeShape("embed_patches", lambda: embed_patches(64, 1, 288, keep=0.2)),
    "embed replaced": WholeShape("embed_patches", lambda: embed_patches(64, 1, 288)),
    "embed clips": WholeShape("embed_patches", lambda: embed_patches(16, 4, 224, keep=0.2)),
}


def cast(op: str, arguments: dict[str, Any], dtype: torch.dtype, precise: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments with floating tensors in ``dtype``, as leaves where the op differentiates by them."""

    def one(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        kept = name in precise and dtype.itemsize < 4
        return value.detach().to(value.dtype if kept else dtype).requires_grad_(name not in CASES[op].frozen)

    return {name: one(name, value) for name, value in arguments.items()}


def run(op: str, arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The output ("sum" is a second one), and the gradient of a fixed random projection by every leaf, by name."""
    out = getattr(ops, op)(**arguments, **options)
    outputs = dict(zip(("out", "sum"), out if isinstance(out, tuple) else (out,), strict=False))
    leaves = {name: t for name, t in arguments.items() if isinstance(t, Tensor) and t.requires_grad}
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = [
        torch.randn(t.shape, generator=generator, device=DEVICE).to(t.dtype) if t.ndim else None
        for t in outputs.values()
    ]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return {name: t.detach() for name, t in outputs.items()} | dict(zip(leaves, found, strict=True))
