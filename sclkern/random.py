"""Counter-based random numbers in plain integer tensor operations.

The masks of a step depend on (seed, sample, position) alone: not on the device, the order of the draws, or how the
work is cut into tiles. Philox-4x32 (Salmon et al., SC 2011) is the generator Triton offers as ``tl.philox``, so a
kernel draws the same numbers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# Streams: one for each purpose, so that no two draws of a step share numbers.
STREAM_PATCHES, STREAM_TOKENS, STREAM_MLM, STREAM_COMPLETION, STREAM_ITM = range(5)
STREAM_ATTENTION, STREAM_MATCHES, STREAM_FALSE_PLACES, STREAM_FEATURES = 6, 7, 8, 16
# Before the step in the seed of a step; the seeds of a model, of validation and of its loader have other numbers.
_STEP = 1

_WORD = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85


def _pair(first: int, second: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    pair = torch.full(shape, first, dtype=torch.int64, device=device)
    pair[1].fill_(second)
    return pair


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
    # Both halves of a round in one operation each, which are launches on a GPU: words 2 and 0, and words 1 and 3.
    halves = (2, *[1] * counter.ndim)
    multiplier, weyl = (
        _pair(*pair, halves, counter.device) for pair in ((_MULTIPLIER_B, _MULTIPLIER_A), (_WEYL_A, _WEYL_B))
    )
    key = torch.stack((seed.reshape(()), seed.reshape(()) >> 32)).view(halves) & _WORD
    even = torch.stack((torch.full_like(counter, stream), counter & _WORD))
    last = torch.zeros_like(counter) if last is None else (last & _WORD).expand_as(counter)
    odd = torch.stack(((counter >> 32) & _WORD, last))
    for _ in range(rounds):
        # The product of two 32-bit words fills 64 bits: int64 wraps, and its bits are still those of the uint64 one.
        product = even * multiplier
        even = (((product >> 32) & _WORD) ^ odd ^ key).flip(0)
        odd = product & _WORD
        key = (key + weyl) & _WORD
    word2, word0 = even.unbind()
    word1, word3 = odd.unbind()
    return word0, word1, word2, word3


def random_words(
    shape: tuple[int, int],
    *,
    seed: int | Tensor,
    stream: int,
    device: torch.device | str,
    row_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Philox words for a (rows, columns) grid whose counter is ``row << 32 | column``.

    A row keeps its numbers when the grid gets wider, so padding a batch changes nothing.

    Args:
        shape: rows and columns.
        seed: as in ``philox``.
        stream: as in ``philox``.
        device: of the words.
        row_ids: (rows,) int64 on ``device``, 0 to 2**32 - 1, in place of the indices of the rows, so that a row keeps
            its numbers in another batch; None are the indices.

    Returns:
        Four (rows, columns) int64 tensors, uniform on [0, 2**32).
    """
    rows = torch.arange(shape[0], device=device, dtype=torch.int64) if row_ids is None else row_ids
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


def step_seed(seed: int, step: int) -> int:
    """The seed of everything that an optimiser step draws: masks, dropout, which images are false.

    It is the same in every micro-batch and on every rank; what sets their rows apart is each row's place in the global
    batch.

    Args:
        seed: of the run.
        step: number of the step, from 0.

    Returns:
        Int on [0, 2**63).
    """
    return mix_seed(seed, _STEP, step)


def seed_tensor(seed: int | Tensor | None, device: torch.device | str) -> Tensor:
    """An int64 tensor of one element on ``device``: the seed, or one drawn from torch's generator of that device."""
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    if seed is None:
        taken = None if torch.compiler.is_compiling() else _taken_seed(device)
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device) if taken is None else taken
    # Filled on the device, because a copy waits.
    return torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def module_seeds(seed: int | Tensor, count: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Seeds of modules by their number, each a function of (seed, number) alone.

    Args:
        seed: of the step: int, or int64 tensor of one element on ``device``.
        count: how many.
        device: of the seeds.

    Returns:
        (1,) int64 each, views of one tensor.
    """
    # An odd factor gives each number a key of its own. Two numbers apart, for the reason given in ``_Draw``.
    offsets = torch.arange(2, 2 * count + 2, device=device).view(count, 2) * (0xBF58476D1CE4E5B9 - 2**64)
    return (offsets + seed_tensor(seed, device))[:, :1].unbind()


# Seeds of one draw, more than a step of the base model takes; and how many views are made of it at once.
DRAWN_SEEDS, VIEWS = 256, 32


class _Draw:
    """By device, the seeds that are taken next, the last of them first, and the others that were drawn with them."""

    def __init__(self, ready: dict[torch.device | str, list[Tensor]], rest: dict[torch.device | str, Tensor]) -> None:
        self.ready, self.rest = ready, rest

    def copy(self) -> _Draw:
        return _Draw({device: list(seeds) for device, seeds in self.ready.items()}, dict(self.rest))

    def take(self, device: torch.device | str) -> Tensor:
        return (self.ready.get(device) or self._more(device)).pop()

    def _more(self, device: torch.device | str) -> list[Tensor]:
        rest = self.rest.get(device)
        if rest is None or not len(rest):
            # Two numbers apart, because a kernel takes addresses that are multiples of 16 without another look.
            rest = torch.randint(2**63 - 1, (DRAWN_SEEDS, 2), dtype=torch.int64, device=device)[:, :1]
        self.ready[device], self.rest[device] = list(rest[:VIEWS].unbind())[::-1], rest[VIEWS:]
        return self.ready[device]


class _Taking(AbstractContextManager[None]):
    """Inside, ops take their seeds from a draw, or each time anew from a copy of it.

    Only code that runs once takes from it: what a checkpoint runs again later, outside, must draw for itself both
    times. Such code has hooks on saved tensors, or gradients off, that were not there where the context began.
    """

    def __init__(self, draw: _Draw, *, anew: bool = False) -> None:
        self.draw, self.anew = draw, anew

    def __enter__(self) -> None:
        self.token = _taking.set((self.draw.copy() if self.anew else self.draw, _surroundings()))

    def __exit__(self, *_: object) -> None:
        _taking.reset(self.token)


_taking: ContextVar[tuple[_Draw, tuple[Any, ...]] | None] = ContextVar("seeds", default=None)


def _surroundings() -> tuple[Any, ...]:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _current() -> _Draw | None:
    """The draw from which code that runs here may take."""
    taking = _taking.get()
    return None if taking is None or taking[1] != _surroundings() else taking[0]


def _taken_seed(device: torch.device | str) -> Tensor | None:
    draw = _current()
    return None if draw is None else draw.take(device)


def one_seed_draw() -> AbstractContextManager[None]:
    """Inside, ops without a seed take theirs from one tensor, which the first of them draws from torch's generator:
    one launch instead of one for each op. Compiled code draws its own.

    Returns:
        The context; inside another it changes nothing.
    """
    return nullcontext() if torch.compiler.is_compiling() or _current() is not None else _Taking(_Draw({}, {}))


def seeds_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint.checkpoint``: what runs again takes the seeds that it took before.

    Returns:
        The contexts of the forward and of the recomputation.
    """
    draw = _current()
    if draw is None:
        return nullcontext(), nullcontext()
    # A copy of now: what the forward draws beyond it, the recomputation draws again from the same generator state.
    return _Taking(draw), _Taking(draw.copy(), anew=True)
