"""Counter-based random numbers in plain integer tensor operations.

The masks of a step depend on (seed, sample, position) alone: not on the device, the order of the draws, or how the
work is cut into tiles. Philox-4x32 (Salmon et al., SC 2011) is the generator Triton offers as ``tl.philox``, so a
kernel draws the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Streams: one for each purpose, so that no two draws of a step share numbers.
STREAM_PATCHES, STREAM_TOKENS, STREAM_MLM, STREAM_COMPLETION, STREAM_ITM = range(5)
STREAM_ATTENTION, STREAM_FEATURES = 6, 16

_WORD = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85


def _multiply_high_low(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # The product of two 32-bit words fills 64 bits: int64 wraps, and its bits are still those of the uint64 product.
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def philox(
    seed: int | Tensor, counter: Tensor, stream: int = 0, *, rounds: int = 10, last: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Four words of Philox-4x32 for each counter.

    Args:
        seed: 64-bit key, an int or an int64 tensor of one element (which may live on a GPU).
        counter: int64 tensor of any shape, the low two words of the 128-bit counter.
        stream: the third word: draws of different purposes use different streams.
        rounds: 10 is the standard; 7 is the fewest known to pass BigCrush.
        last: int64, broadcastable to ``counter``: its low 32 bits are the last word. None is 0.

    Returns:
        Four int64 tensors of the shape of ``counter``, each uniform on [0, 2**32).
    """
    if isinstance(seed, int):
        # As a signed 64-bit number, because torch has no unsigned scalar; filled on the device, because a copy waits.
        seed = torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=counter.device)
    key_a, key_b = seed & _WORD, (seed >> 32) & _WORD
    word0, word1 = counter & _WORD, (counter >> 32) & _WORD
    word2 = torch.full_like(counter, stream)
    word3 = torch.zeros_like(counter) if last is None else (last & _WORD).expand_as(counter)
    for _ in range(rounds):
        high_b, low_b = _multiply_high_low(word2, _MULTIPLIER_B)
        high_a, low_a = _multiply_high_low(word0, _MULTIPLIER_A)
        word0, word1, word2, word3 = high_b ^ word1 ^ key_a, low_b, high_a ^ word3 ^ key_b, low_a
        key_a, key_b = (key_a + _WEYL_A) & _WORD, (key_b + _WEYL_B) & _WORD
    return word0, word1, word2, word3


def random_words(
    shape: tuple[int, int], *, seed: int | Tensor, stream: int, device: torch.device | str
) -> tuple[Tensor, ...]:
    """Philox words for a (rows, columns) grid whose counter is ``row << 32 | column``.

    A row keeps its numbers when the grid gets wider, so padding a batch changes nothing.

    Args:
        shape: rows and columns.
        seed: as in ``philox``.
        stream: as in ``philox``.
        device: of the words.

    Returns:
        Four (rows, columns) int64 tensors, uniform on [0, 2**32).
    """
    rows = torch.arange(shape[0], device=device, dtype=torch.int64)
    columns = torch.arange(shape[1], device=device, dtype=torch.int64)
    return philox(seed, (rows[:, None] << 32) | columns, stream)


def uniform(words: Tensor) -> Tensor:
    """Words on [0, 2**32) as float32 on [0, 1): the upper 24 bits, so that 1.0 is never reached."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def below(words: Tensor, bound: int | Tensor) -> Tensor:
    """Words on [0, 2**32) as int64 on [0, bound) by multiplication (bias below bound / 2**32)."""
    return (words * bound) >> 32


def smallest(keys: Tensor, eligible: Tensor, count: Tensor | int) -> Tensor:
    """Mark the ``count`` eligible columns of each row with the smallest keys: a uniform draw without replacement.

    Args:
        keys: (B, N) int64 words on [0, 2**32).
        eligible: (B, N) bool.
        count: int or (B, 1) int64.

    Returns:
        (B, N) bool; ``min(count, eligible in the row)`` columns are True.
    """
    ranked = torch.where(eligible, keys, 2**32)
    # Stable, so that equal keys (a 2**-32 event) are settled by position on every device.
    rank = ranked.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count) & eligible


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers (run seed, step, micro-batch, rank ...), by SplitMix64's finaliser."""
    state = 0
    for part in parts:
        state = (state + 0x9E3779B97F4A7C15 + part) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 1


def seed_tensor(seed: int | Tensor | None, device: torch.device | str) -> Tensor:
    """An int64 tensor of one element on ``device``: the seed, or one drawn from torch's generator of that device."""
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    # Filled on the device, because a copy waits.
    return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
