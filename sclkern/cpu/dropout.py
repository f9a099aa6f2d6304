"""Dropout masks of seeds, bit for bit those of ``sclkern.reference``, drawn in pieces that a core's cache holds."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from sclkern.cpu import problems as form_problems
from sclkern.random import (
    _MULTIPLIER_A,
    _MULTIPLIER_B,
    _WEYL_A,
    _WEYL_B,
    _WORD,
    STREAM_ATTENTION,
    STREAM_FEATURES,
)
from sclkern.reference.dropout_add_layer_norm import feature_dropout_threshold

# Calls of Philox at once, each for eight elements.
PIECE = 32768
ROUNDS = 7
# The sign bits of four 16-bit numbers: draws become signed, because torch does not compare unsigned ones.
_SIGNS = 0x8000800080008000 - 2**64
LOWEST = -(2**15)


def problems(dropout_p: float, *tensors: Tensor | None) -> tuple[str, ...]:
    """Why no mask is drawn here for these tensors."""
    # 16 bits have no number above all draws.
    every = ("everything is dropped",) if round(dropout_p * 2**16) == 2**16 else ()
    return (*every, *form_problems(*tensors))


class _Scratch(threading.local):
    """Memory of each thread that draws, which it keeps: fresh memory costs more than the arithmetic in it."""

    def __init__(self) -> None:
        self.words = torch.empty(0, dtype=torch.int64)

    def take(self, rows: int, columns: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Six tensors (rows, columns) and one (rows, columns, 2) of int64, which the next call returns again."""
        size = rows * columns
        if len(self.words) < 8 * size:
            self.words = torch.empty(8 * size, dtype=torch.int64)
        words = self.words[: 6 * size].view(6, rows, columns).unbind()
        return words, self.words[6 * size : 8 * size].view(rows, columns, 2)


_scratch = _Scratch()


def draw(seed: int, ids: Tensor, counters: Tensor, stream: int) -> Tensor:
    """Draws of Philox-4x32 with 7 rounds for every id and every counter.

    The first two rounds are computed for the ids alone and for the counters alone, as far as these have not met.

    Args:
        seed: 64-bit key.
        ids: (R,) int64; the low half is the second word of Philox' counter, the high half the last.
        counters: (C,) int64 below 2**32, the first word.
        stream: the third word.

    Returns:
        (R, 8 C) int16: of each counter eight 16-bit draws, less 2**15. The next call in the same thread overwrites
        them.
    """
    ids, counters = ids[:, None], counters[None]
    last = (ids >> 32) & _WORD
    word0, word1, word2 = counters, ids & _WORD, counters.new_full((1, 1), stream)
    # A last word of 0 for all lets the ids and the counters meet a round later.
    word3 = last if bool(last.any()) else last[:1]
    low, high = seed & _WORD, (seed >> 32) & _WORD
    keys = [((low + i * _WEYL_A) & _WORD, (high + i * _WEYL_B) & _WORD) for i in range(ROUNDS)]
    (room0, room2, *products), draws = _scratch.take(ids.shape[0], counters.shape[1])
    for number, (key_low, key_high) in enumerate(keys):
        # A product's low half is a word of the next round, its high half is mixed into another. The high halves of odd
        # words stay what they are until a mask takes them away.
        into0, into2 = products[:2] if number % 2 else products[2:]
        product0, product2 = _times(word0, _MULTIPLIER_A, into0), _times(word2, _MULTIPLIER_B, into2)
        word0, word1 = _mix(product2, word1, key_low, room0), product2
        word2, word3 = _mix(product0, word3, key_high, room2), product0
    for half, (first, second) in enumerate(((word0, word1), (word2, word3))):
        second <<= 32
        second ^= first
        torch.bitwise_xor(second, _SIGNS, out=draws[..., half])
    return draws.view(torch.int16).flatten(1)


def _times(word: Tensor, factor: int, room: Tensor) -> Tensor:
    """The product, in ``room`` if it is of that shape."""
    return torch.mul(word, factor, out=room) if word.shape == room.shape else word * factor


def _mix(product: Tensor, odd: Tensor, key: int, room: Tensor) -> Tensor:
    """The high half of a product, mixed with a word and a key; in ``room`` if it is of that shape."""
    if product.shape == room.shape:
        torch.bitwise_right_shift(product, 32, out=room)
        room ^= odd
        room &= _WORD
        room ^= key
        return room
    # Of the ids or the counters alone; what they are mixed into may be of both.
    high, odd = ((product >> 32) & _WORD) ^ key, odd & _WORD
    meet = all(max(sizes) == size for *sizes, size in zip(high.shape, odd.shape, room.shape, strict=True))
    return torch.bitwise_xor(high, odd, out=room) if meet else high ^ odd


def feature_pieces(ids: Tensor, columns: int, dropout_p: float, seed: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Draw the mask of ``reference.feature_dropout_keep`` piece by piece.

    Args:
        ids: (R,) int64, of the rows.
        columns: C.
        dropout_p: below 1.
        seed: of the mask.

    Yields:
        Rows, their draws (rows, C) int16 until the next piece, and the number from which a draw keeps its element.
    """
    counters = torch.arange((columns + 7) // 8)
    rows = max(1, PIECE // max(1, len(counters)))
    for start in range(0, len(ids), rows):
        part = slice(start, min(start + rows, len(ids)))
        draws = draw(seed, ids[part], counters, STREAM_FEATURES)
        yield part, draws[:, :columns], feature_dropout_threshold(dropout_p) + LOWEST


def attention_draws(ids: Tensor, counters: Tensor, num_queries: int, num_keys: int, seed: int) -> Tensor:
    """Draw the mask of ``reference.attention_dropout_mask``.

    Args:
        ids: (N,) int64, id * H + h of samples and heads.
        counters: of ``attention_counters`` for these lengths.
        num_queries: Lq.
        num_keys: Lk.
        seed: of the mask.

    Returns:
        (N, Lq, Lk) int16 until the next call: an element is kept from its threshold + ``LOWEST`` on.
    """
    return draw(seed, ids, counters, STREAM_ATTENTION).view(len(ids), num_queries, -1)[..., :num_keys]


def attention_counters(num_queries: int, num_keys: int) -> Tensor:
    """(Lq * groups of eight keys,) int64: the first word of Philox' counter for queries and keys."""
    return ((torch.arange(num_queries) << 16)[:, None] | torch.arange((num_keys + 7) // 8)).flatten()
