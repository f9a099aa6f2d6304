"""Dimensions of base pre-training, and what the ops of attention share.

Width 768, 12 heads of head_dim 64, images of 288 px in 324 patches of 16 px, captions of 13 tokens on average and at
most 50, a vocabulary of 50,265.
"""

from __future__ import annotations

from sclkern.tools.specs._spec import Cost, Size, Values

WIDTH, HEADS, HEAD_DIM, VOCABULARY = 768, 12, 64, 50265
IMAGE_SIZE, PATCH_SIZE, PATCHES = 288, 16, 324
# Tokens of captions with <s> and </s>, repeated for a batch: 13 on average, as COCO's.
CAPTIONS = (12, 13, 12, 14, 11, 15, 13, 16, 12, 13, 18, 12, 11, 14, 13, 10)
# FLOPs of attention's backward over those of its forward: five matrix products where the forward has two.
ATTENTION_BACKWARD = 2.5
# Attention scores in float32 stay within a few units.
LARGEST_SCORE = 8.0


def captions(batch: int, longest: int | None = None) -> list[int]:
    """Tokens of every caption of a batch.

    Args:
        batch: number of captions.
        longest: tokens of the first caption and most of any other; default: the captions as they are.

    Returns:
        ``batch`` lengths.
    """
    lengths = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]
    return lengths if longest is None else [longest, *(min(length, longest) for length in lengths[1:])]


def sequence_lengths(v: Values) -> tuple[list[int], list[int]]:
    """Lengths of the query and of the key sequences of a batch.

    Sides named in ``text`` ("q", "k") are captions, of which only the tokens count, not their padding.
    """
    text = captions(v["B"], v.get("longest"))
    queries = text if "q" in v["text"] else [v["Lq"]] * v["B"]
    keys = text if "k" in v["text"] else [v["Lk"]] * v["B"]
    return queries, keys


def attention_cost(queries: int, keys: int, flops: float, element_size: int) -> Cost:
    """Query, key, value and output once, their gradients too in the backward, and a float32 log-sum-exp.

    Args:
        queries: query tokens of the whole batch.
        keys: key tokens of the whole batch.
        flops: FLOPs of the forward.
        element_size: bytes of an element.

    Returns:
        Bytes and FLOPs of the forward and of the backward.
    """
    tensors, lse = 2 * (queries + keys) * WIDTH * element_size, queries * HEADS * 4
    return Cost(tensors + lse, flops, 2 * tensors + 2 * lse, ATTENTION_BACKWARD * flops)


def packed_attention_cost(v: Values, element_size: int) -> Cost:
    """Attention of B sequences: 4 Lq Lk head_dim FLOPs a head."""
    queries, keys = sequence_lengths(v)
    flops = 4 * WIDTH * sum(q * k for q, k in zip(queries, keys, strict=True))
    return attention_cost(sum(queries), sum(keys), flops, element_size)


def attention_sizes(batch: int, dropout_p: float, *names: str) -> tuple[Size, ...]:
    """The sizes of attention in pre-training, query length by key length.

    Args:
        batch: number of sequences.
        dropout_p: dropout probability.
        *names: the sizes to return; all without names.

    Returns:
        The sizes, most important first.
    """
    sides = {
        "325": (325, 325, "", 1),
        "325x13": (325, 18, "k", 1),
        "13x325": (18, 325, "q", 2),
        "65": (65, 65, "", 2),
        "13": (18, 18, "qk", 2),
    }
    return tuple(
        Size(name, {"B": batch, "Lq": q, "Lk": k, "text": text}, priority, dropout_p)
        for name, (q, k, text, priority) in sides.items()
        if name in (names or sides)
    )


def row_sizes(rows: tuple[int, ...], first: int) -> tuple[Size, ...]:
    """Sizes that are a number of rows, of which ``first`` has priority 1 and the others 3."""
    return tuple(Size(str(n), {"N": n}, 1 if n == first else 3) for n in rows)
