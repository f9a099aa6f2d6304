"""The sizes at which each op works in pre-training, and the bytes and operations that it cannot do without.

Base model: width 768, 12 heads of 64 channels, 288 pixel pictures in 324 patches of 16, captions of 13 tokens on
average, 50,265 words. Bytes count every input and output once, and what the backward needs kept (a log-sum-exp in
float32); operations count matrix products alone, a multiply-add as two. A time below ``floor`` is not possible from
cold memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

WIDTH, HEADS, HEAD, VOCABULARY = 768, 12, 64, 50265
PATCHES, PATCH, SIDE = 324, 16, 288
# Tokens of captions with <s> and </s>, repeated for a batch: 13 on average, as COCO's.
CAPTIONS = (12, 13, 12, 14, 11, 15, 13, 16, 12, 13, 18, 12, 11, 14, 13, 10)
# Of a backward of attention, in products of the forward: five where the forward has two.
ATTENTION_BACKWARD = 2.5
PASSES = ("forward", "backward", "both")


class Cost(NamedTuple):
    """Bytes and operations of a forward and of its backward."""

    forward_bytes: float
    forward_flops: float
    backward_bytes: float = 0.0
    backward_flops: float = 0.0

    def of(self, part: str) -> tuple[float, float]:
        """(bytes, operations) of "forward", "backward" or "both"."""
        forward, backward = self[:2], self[2:]
        if part == "both":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if part == "forward" else backward


class Rates(NamedTuple):
    """Bytes per second of a copy (read and written), and operations per second of matrix products."""

    bandwidth: float
    matrix: float


# Of an H200, in bfloat16, at copy and at large matrix products of random data.
PLANNED = Rates(4.3e12, 790e12)


def floor(cost: Cost, part: str, rates: Rates) -> float:
    """Seconds below which a machine of these rates cannot be; forward and backward each have their own bound."""
    if part == "both":
        return floor(cost, "forward", rates) + floor(cost, "backward", rates)
    moved, flops = cost.of(part)
    return max(moved / rates.bandwidth, flops / rates.matrix)


def captions(batch: int) -> list[int]:
    """Tokens of each of the captions of a batch."""
    return [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]


def attention(v: dict, e: int) -> Cost:
    """Of B samples: 4 Lq Lk D operations a head; Q, K, V, O once, their gradients beside them in the backward.

    ``text`` names the sides that are captions: only their tokens count, not what pads them.
    """
    tokens = captions(v["B"])
    queries = tokens if "q" in v["text"] else [v["Lq"]] * v["B"]
    keys = tokens if "k" in v["text"] else [v["Lk"]] * v["B"]
    flops = 4 * WIDTH * sum(q * k for q, k in zip(queries, keys, strict=True))
    return _attention_cost(sum(queries), sum(keys), flops, e)


def frame_attention(v: dict, e: int) -> Cost:
    """A frame's first token attends to all F (1 + P) tokens, each of its P patches to the 1 + P of the frame."""
    frames, patches = v["F"], v["P"]
    tokens = frames * (1 + patches)
    scores = frames * tokens + frames * patches * (1 + patches)
    return _attention_cost(v["B"] * tokens, v["B"] * tokens, 4 * WIDTH * v["B"] * scores, e)


def _attention_cost(queries: int, keys: int, flops: float, e: int) -> Cost:
    tensors, lse = 2 * (queries + keys) * WIDTH * e, queries * HEADS * 4
    return Cost(tensors + lse, flops, 2 * tensors + 2 * lse, ATTENTION_BACKWARD * flops)


def cross_attention(v: dict, e: int) -> Cost:
    """The sub-layer in the cheapest of its forms: every projection made, or those of the longer side absorbed."""
    batch, width = v["B"], WIDTH
    tokens = captions(batch)
    queries = [v["Lq"]] * batch if v["text"] == "k" else tokens
    keys = tokens if v["text"] == "k" else [v["Lk"]] * batch
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True))
    short = 8 * min(sum(queries), sum(keys)) * width**2
    plain = (4 * (sum(queries) + sum(keys)) * width**2, 4 * pairs * width)
    # Scores and sums over values of the full width for every head.
    absorbed = (short, 4 * pairs * HEADS * width)
    products, core = min(plain, absorbed, key=sum)
    weights = 4 * width**2 * e
    rows = width * e
    forward = (2 * sum(queries) + sum(keys)) * rows + weights
    backward = (3 * sum(queries) + 2 * sum(keys)) * rows + 2 * weights
    return Cost(forward, products + core, backward, 2 * products + ATTENTION_BACKWARD * core)


def completion_loss(v: dict, e: int) -> Cost:
    """N x N similarities forward, one product of their gradient back: the complete side is detached, S is kept."""
    tensor, statistics = v["N"] * WIDTH * e, 2 * v["N"] * 4
    flops = 2 * v["N"] ** 2 * WIDTH
    return Cost(2 * tensor + statistics, flops, 3 * tensor + statistics, flops)


def linear_cross_entropy(v: dict, e: int) -> Cost:
    """The weight is read once forward, read and its gradient written in the backward."""
    weight, hidden = VOCABULARY * WIDTH * e, v["N"] * WIDTH * e
    flops = 2 * v["N"] * VOCABULARY * WIDTH
    return Cost(weight + hidden, flops, 2 * weight + 2 * hidden, 2 * flops)


def dropout_add_layer_norm(v: dict, e: int) -> Cost:
    """x and residual read, y written; back, the gradient and y read, two gradients written."""
    tensor = v["T"] * WIDTH * e
    return Cost(3 * tensor, 0, 4 * tensor, 0)


def bias_gelu(v: dict, e: int) -> Cost:
    """x read, y written; back, the gradient and x read, a gradient written."""
    tensor = v["T"] * 4 * WIDTH * e
    return Cost(2 * tensor, 0, 3 * tensor, 0)


def embed_patches(v: dict, e: int) -> Cost:
    """The pixels of the kept patches, the weight, the tokens; back, the weight's gradient without the pixels'."""
    kept, inner = v["B"] * v["K"], 3 * PATCH**2
    pixels, weight, tokens = kept * inner * e, inner * WIDTH * e, (kept + v["B"]) * WIDTH * e
    flops = 2 * kept * inner * WIDTH
    return Cost(pixels + weight + tokens, flops, pixels + weight + 2 * tokens, flops)


def select_patches(v: dict, e: int) -> Cost:
    return Cost(8 * v["B"] * v["K"], 0)


def select_tokens(v: dict, e: int) -> Cost:
    return Cost(v["B"] * PATCHES, 0)


def mask_text(v: dict, e: int) -> Cost:
    return Cost(v["B"] * (8 + v["L"] * (8 + 8 + 1)), 0)


@dataclass(frozen=True)
class Size:
    """``values`` of an op's dimensions, which dropout it has, and how soon it matters: importance 1 first."""

    name: str
    values: dict = field(hash=False)
    importance: int
    dropout_p: float = 0.0


@dataclass(frozen=True)
class Work:
    """``cost(values, bytes of an element)``; sizes of a GPU, and smaller ones that mean something on a CPU."""

    cost: Callable[[dict, int], Cost]
    gpu: tuple[Size, ...]
    cpu: tuple[Size, ...]
    gradient: bool = True

    def sizes(self, gpu: bool) -> tuple[Size, ...]:
        return self.gpu if gpu else self.cpu


def _attention_sizes(batch: int, dropout_p: float) -> tuple[Size, ...]:
    sides = {"325": (325, 325, "", 1), "325x13": (325, 18, "k", 1), "13x325": (18, 325, "q", 2), "65": (65, 65, "", 2)}
    sides["13"] = (18, 18, "qk", 2)
    return tuple(
        Size(name, {"B": batch, "Lq": q, "Lk": k, "text": text}, importance, dropout_p)
        for name, (q, k, text, importance) in sides.items()
    )


def _scaled(name: str, numbers: tuple[int, ...], most_important: int, **values: int) -> tuple[Size, ...]:
    return tuple(Size(str(n), {name: n, **values}, 1 if n == most_important else 3) for n in numbers)


_ATTENTION, _FEW = _attention_sizes(64, 0.1), _attention_sizes(2, 0.0)
_RAGGED, _RAGGED_FEW = (tuple(s for s in sizes if s.values["text"]) for sizes in (_ATTENTION, _attention_sizes(8, 0.0)))
_DRAWS = Size("64", {"B": 64, "K": 64, "L": 18}, 3)

WORKLOAD: dict[str, Work] = {
    "attention": Work(
        attention,
        # Some libraries have no dropout.
        (*_ATTENTION, Size("325 without dropout", _ATTENTION[0].values, 2)),
        tuple(s for s in _FEW if s.name in ("325", "325x13", "65")),
    ),
    "packed_attention": Work(attention, _RAGGED, tuple(s for s in _RAGGED_FEW if s.name != "13x325")),
    "frame_attention": Work(
        frame_attention,
        (Size("4x197", {"B": 64, "F": 4, "P": 196}, 2),),
        (Size("4x197", {"B": 1, "F": 4, "P": 196}, 2),),
    ),
    "cross_attention": Work(
        cross_attention,
        tuple(s for s in _ATTENTION if s.name in ("325x13", "13x325")),
        tuple(s for s in _FEW if s.name in ("325x13", "13x325")),
    ),
    "completion_loss": Work(
        completion_loss, _scaled("N", (4096, 16384, 65536), 4096), _scaled("N", (512, 1024, 4096), 1024)
    ),
    "linear_cross_entropy": Work(
        linear_cross_entropy, _scaled("N", (125, 832, 3200), 125), _scaled("N", (16, 125), 125)
    ),
    "dropout_add_layer_norm": Work(
        dropout_add_layer_norm,
        (Size("64x325", {"T": 64 * 325}, 1, 0.1), Size("64x13", {"T": sum(captions(64))}, 3, 0.1)),
        (Size("8x325", {"T": 8 * 325}, 1, 0.1),),
    ),
    "bias_gelu": Work(bias_gelu, (Size("64x325", {"T": 64 * 325}, 2),), (Size("4x325", {"T": 4 * 325}, 2),)),
    "embed_patches": Work(
        embed_patches,
        (Size("64 of 324", {"B": 64, "K": 64}, 2), Size("324 of 324", {"B": 64, "K": PATCHES}, 3)),
        (Size("64 of 324", {"B": 4, "K": 64}, 2),),
    ),
    "select_patches": Work(select_patches, (_DRAWS,), (_DRAWS,), gradient=False),
    "select_tokens": Work(select_tokens, (_DRAWS,), (_DRAWS,), gradient=False),
    "mask_text": Work(mask_text, (_DRAWS,), (_DRAWS,), gradient=False),
}
