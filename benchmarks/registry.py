"""Every op of ``sclkern.ops`` with its inputs at the workload's sizes and the ways of computing it that are compared.

Sizes, bytes and operations are those of ``sclkern.tools.bench.workload``, which ``sclkern bench roofline`` reads too.
An op gets its entry here by a function of its name that makes its inputs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import peers
from sclkern import ops, reference
from sclkern.tools.bench.workload import (
    HEAD,
    HEADS,
    PASSES,
    PATCH,
    PATCHES,
    SIDE,
    VOCABULARY,
    WIDTH,
    WORKLOAD,
    Size,
    captions,
)
from ways import DTYPES, UnableError, Way

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Entry:
    """``inputs(values, dtype, device)`` are the op's arguments but dropout; ``leaves`` get gradients."""

    op: str
    inputs: Callable[[dict, torch.dtype, str], dict]
    leaves: tuple[str, ...]
    ways: tuple[Way, ...]


def _attention(v: dict, dtype: torch.dtype, device: str) -> dict:
    query = torch.randn(v["B"], v["Lq"], HEADS, HEAD, device=device).to(dtype)
    key, value = torch.randn(2, v["B"], v["Lk"], HEADS, HEAD, device=device).to(dtype)
    mask = None
    if "k" in v["text"]:
        lengths = torch.tensor(captions(v["B"]), device=device)
        mask = torch.arange(v["Lk"], device=device) < lengths[:, None]
    return {"query": query, "key": key, "value": value, "key_padding_mask": mask}


def _packed_attention(v: dict, dtype: torch.dtype, device: str) -> dict:
    tensors = {}
    for side, length in (("q", v["Lq"]), ("k", v["Lk"])):
        lengths = captions(v["B"]) if side in v["text"] else [length] * v["B"]
        ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        tensors |= {f"cu_seqlens_{side}": ends, f"max_seqlen_{side}": max(lengths)}
        for name in ("query",) if side == "q" else ("key", "value"):
            tensors[name] = torch.randn(sum(lengths), HEADS, HEAD, device=device).to(dtype)
    return tensors


def _frame_attention(v: dict, dtype: torch.dtype, device: str) -> dict:
    shape = (v["B"], v["F"] * (1 + v["P"]), HEADS, HEAD)
    tensors = {name: torch.randn(shape, device=device).to(dtype) for name in ("query", "key", "value")}
    return tensors | {"num_frames": v["F"]}


def _cross_attention(v: dict, dtype: torch.dtype, device: str) -> dict:
    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype)

    tensors = {"x": tensor(v["B"], v["Lq"], WIDTH), "context": tensor(v["B"], v["Lk"], WIDTH)}
    tensors |= {"in_weight": tensor(3 * WIDTH, WIDTH, scale=0.04), "in_bias": tensor(3 * WIDTH, scale=0.1)}
    tensors |= {"out_weight": tensor(WIDTH, WIDTH, scale=0.04), "out_bias": tensor(WIDTH, scale=0.1)}
    if "k" in v["text"]:
        lengths = torch.tensor(captions(v["B"]), device=device)
        tensors["key_padding_mask"] = torch.arange(v["Lk"], device=device) < lengths[:, None]
    return tensors | {"num_heads": HEADS}


def _completion_loss(v: dict, dtype: torch.dtype, device: str) -> dict:
    complete = torch.randn(v["N"], WIDTH, device=device)
    # As close to its own feature as after some training.
    recovered = complete + 2 * torch.randn(v["N"], WIDTH, device=device)
    return {"recovered": recovered.to(dtype), "complete": complete.to(dtype), "temperature": 0.05}


def _linear_cross_entropy(v: dict, dtype: torch.dtype, device: str) -> dict:
    hidden = torch.randn(v["N"], WIDTH, device=device).to(dtype)
    weight = (0.02 * torch.randn(VOCABULARY, WIDTH, device=device)).to(dtype)
    bias = (0.02 * torch.randn(VOCABULARY, device=device)).to(dtype)
    labels = torch.randint(VOCABULARY, (v["N"],), device=device)
    return {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels}


def _dropout_add_layer_norm(v: dict, dtype: torch.dtype, device: str) -> dict:
    tensors = {name: torch.randn(v["T"], WIDTH, device=device).to(dtype) for name in ("x", "residual")}
    return tensors | {name: torch.randn(WIDTH, device=device) for name in ("weight", "bias", "x_bias")}


def _bias_gelu(v: dict, dtype: torch.dtype, device: str) -> dict:
    x = torch.randn(v["T"], 4 * WIDTH, device=device).to(dtype)
    return {"x": x, "bias": torch.randn(4 * WIDTH, device=device)}


def _embed_patches(v: dict, dtype: torch.dtype, device: str) -> dict:
    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype)

    tensors = {"images": tensor(v["B"], 1, 3, SIDE, SIDE), "weight": tensor(WIDTH, 3, PATCH, PATCH, scale=0.04)}
    tensors |= {"position": tensor(1 + PATCHES, WIDTH), "cls": tensor(WIDTH)}
    tensors |= {name: tensor(WIDTH) for name in ("norm_weight", "norm_bias")}
    if v["K"] < PATCHES:
        tensors["keep"] = reference.select_patches(PATCHES, v["K"] / PATCHES, v["B"], seed=1, device=device)
    return tensors


def _select_patches(v: dict, dtype: torch.dtype, device: str) -> dict:
    return {"num_patches": PATCHES, "keep_ratio": v["K"] / PATCHES, "batch": v["B"], "seed": _seed(device)}


def _select_tokens(v: dict, dtype: torch.dtype, device: str) -> dict:
    return {"num_patches": PATCHES, "ratio": 0.5, "batch": v["B"], "seed": _seed(device)}


def _mask_text(v: dict, dtype: torch.dtype, device: str) -> dict:
    ids = torch.randint(5, VOCABULARY - 1, (v["B"], v["L"]), device=device)
    options = {"kind": "mlm", "ratio": 0.15, "mask_id": VOCABULARY - 1, "vocab_size": VOCABULARY}
    return {"ids": ids, "lengths": torch.tensor(captions(v["B"]), device=device), "seed": _seed(device), **options}


def _seed(device: str) -> Tensor:
    return torch.tensor([7], device=device)


def call(module, op: str) -> Callable[..., object]:
    """The op of ``sclkern.ops`` or ``sclkern.reference``, looked up when it is called."""

    def run(inputs: dict, dropout_p: float, seed: Tensor | None):
        options = {"dropout_p": dropout_p, "seed": seed} if dropout_p else {}
        if op in ("select_patches", "select_tokens"):
            options["device"] = inputs["seed"].device
        return getattr(module, op)(**inputs, **options)

    return run


def _forced(name: str, *tensors: Tensor, **options) -> Tensor:
    """torch's attention of (B, L, H, D) by one backend, with the reason that torch gives where it cannot."""
    tensors = tuple(tensor.transpose(1, 2) for tensor in tensors)
    with warnings.catch_warnings(record=True) as told, sdpa_kernel(BACKENDS[name]):
        warnings.simplefilter("always")
        try:
            return F.scaled_dot_product_attention(*tensors, **options).transpose(1, 2)
        except RuntimeError as error:
            reasons = [str(warning.message).split(" (Triggered")[0] for warning in told]
            # The first lines only say that a kernel is not used because of what follows.
            reasons = [reason for reason in reasons if "not used because" not in reason] or [str(error).split("\n")[0]]
            raise UnableError(f"torch SDPA {name}: {'; '.join(reasons)}") from error


def _sdpa_attention(name: str, inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    mask = inputs["key_padding_mask"]
    mask = None if mask is None else mask[:, None, None]
    return _forced(name, inputs["query"], inputs["key"], inputs["value"], attn_mask=mask, dropout_p=dropout_p)


@functools.lru_cache(maxsize=1)
def _frame_mask(frames: int, tokens: int, device: torch.device) -> Tensor:
    return reference.frame_attention_mask(frames, tokens, device)


def _varlen(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    """torch's own attention of packed sequences, by FlashAttention; it has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = (inputs[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
    try:
        return varlen_attn(inputs["query"], inputs["key"], inputs["value"], *lengths)
    except RuntimeError as error:
        raise UnableError(f"torch varlen: {str(error).splitlines()[0]}") from error


def _sdpa_frame_attention(name: str, inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    query, frames = inputs["query"], inputs["num_frames"]
    mask = _frame_mask(frames, query.shape[1] // frames, query.device)
    return _forced(name, query, inputs["key"], inputs["value"], attn_mask=mask)


def _sdpa_cross_attention(name: str, inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    x, context, mask = inputs["x"], inputs["context"], inputs.get("key_padding_mask")
    query = F.linear(x, inputs["in_weight"][:WIDTH], inputs["in_bias"][:WIDTH])
    key, value = F.linear(context, inputs["in_weight"][WIDTH:], inputs["in_bias"][WIDTH:]).chunk(2, -1)
    split = (tensor.unflatten(-1, (HEADS, HEAD)) for tensor in (query, key, value))
    mask = None if mask is None else mask[:, None, None]
    out = _forced(name, *split, attn_mask=mask, dropout_p=dropout_p)
    return F.linear(out.flatten(2), inputs["out_weight"], inputs["out_bias"])


def _convolution(inputs: dict, dropout_p: float, seed: Tensor | None) -> Tensor:
    """All patches by a strided convolution, of which some are kept then, as published models do."""
    images, position, keep = inputs["images"][:, 0], inputs["position"], inputs.get("keep")
    tokens = F.conv2d(images, inputs["weight"], stride=PATCH).flatten(2).transpose(1, 2) + position[1:]
    if keep is not None:
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, WIDTH))
    first = (inputs["cls"] + position[0]).expand(len(tokens), 1, -1)
    return F.layer_norm(torch.cat([first, tokens], 1), (WIDTH,), inputs["norm_weight"], inputs["norm_bias"])


def _sdpa(function: Callable[..., Tensor]) -> tuple[Way, ...]:
    return tuple(Way(f"sdpa-{name}", functools.partial(function, name)) for name in BACKENDS)


# Inputs, what gets gradients, ways of computing it beside the op, its definition and its definition compiled.
_QKV = ("query", "key", "value")
_TABLE = {
    "attention": (_attention, _QKV, _sdpa(_sdpa_attention)),
    "packed_attention": (_packed_attention, _QKV, (Way("varlen", _varlen, dropout=False, dtypes=DTYPES[:2]),)),
    "frame_attention": (_frame_attention, _QKV, _sdpa(_sdpa_frame_attention)),
    "cross_attention": (
        _cross_attention,
        ("x", "context", "in_weight", "in_bias", "out_weight", "out_bias"),
        _sdpa(_sdpa_cross_attention),
    ),
    "completion_loss": (_completion_loss, ("recovered",), ()),
    "linear_cross_entropy": (_linear_cross_entropy, ("hidden", "weight", "bias"), ()),
    "dropout_add_layer_norm": (_dropout_add_layer_norm, ("x", "residual", "weight", "bias", "x_bias"), ()),
    "bias_gelu": (_bias_gelu, ("x", "bias"), ()),
    "embed_patches": (
        _embed_patches,
        ("weight", "position", "cls", "norm_weight", "norm_bias"),
        (Way("convolution", _convolution),),
    ),
    "select_patches": (_select_patches, (), ()),
    "select_tokens": (_select_tokens, (), ()),
    "mask_text": (_mask_text, (), ()),
}


def _entry(op: str) -> Entry:
    inputs, leaves, others = _TABLE[op]
    pairs = (("sclkern", ops), ("eager", reference))
    own = (Way(name, call(module, op), seeded=True, slack=1.0) for name, module in pairs)
    compiled = Way("compile", call(reference, op), compiled=True)
    return Entry(op, inputs, leaves, (*own, compiled, *others, *peers.PEERS.get(op, ())))


ENTRIES: dict[str, Entry] = {op: _entry(op) for op in _TABLE}


@dataclass(frozen=True)
class Case:
    """One figure: an op at a size, in a dtype, computed in one way, of one pass."""

    op: str
    size: Size
    dtype: torch.dtype
    way: Way
    part: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "/".join((self.op, self.size.name.replace(" ", "-"), dtype, self.part, self.way.name))

    @property
    def importance(self) -> int:
        """1 to 3: of the size; half precision but bfloat16 and float32 come last, the backward alone is second."""
        second = self.part == "backward" or self.way.name in ("sdpa-math",)
        third = torch.cuda.is_available() and self.dtype != torch.bfloat16
        return max(self.size.importance, 2 if second else 1, 3 if third else 1)


# On a CPU torch.compile takes many seconds for each: where memory and not products takes the time.
COMPILED_ON_CPU = ("attention", "bias_gelu", "completion_loss", "dropout_add_layer_norm", "embed_patches")


def cases(gpu: bool) -> list[Case]:
    """All of them for a machine; neighbours share their inputs. On a CPU, other libraries have one case an op."""
    found = []
    for op, entry in ENTRIES.items():
        work = WORKLOAD[op]
        for size in work.sizes(gpu):
            for dtype in DTYPES if gpu and work.gradient else DTYPES[-1:]:
                for way in entry.ways:
                    parts = PASSES if work.gradient else PASSES[:1]
                    if not gpu:
                        parts = _on_a_cpu(op, size, way, parts)
                    found += [Case(op, size, dtype, way, part) for part in parts]
    return found


def _on_a_cpu(op: str, size: Size, way: Way, parts: tuple[str, ...]) -> tuple[str, ...]:
    if way.name in ("sclkern", "eager"):
        return parts
    if not (way.package or way.compiled):
        return tuple(part for part in parts if part != "backward")
    once = size is WORKLOAD[op].cpu[0] and (way.package or op in COMPILED_ON_CPU)
    return parts[-1:] if once else ()
