"""Which pair stands where: the order of training data as a function of the seed, the data and the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

# Of the seeds of a weighted order, beside those of plain epochs and of samples.
_WEIGHTED = 1


class Order(Protocol):
    """Which pair stands at each place of the global batch of each step.

    Attributes:
        steps_per_epoch: steps in which as many pairs come as there are.
    """

    steps_per_epoch: float

    def at(self, step: int, place: torch.Tensor) -> list[tuple[int, int]]:
        """The epoch and the pair at each of these places (R,) int64 of a step."""


class PairOrder:
    """The pair at each place of the global batch of each step, whichever process reads it, and when.

    Every epoch has a seeded order of its own and as many whole global batches as fit into it; the pairs that are left
    over come to their turn in other epochs. If the data do not fill one global batch, epochs follow one another without
    gaps, and a global batch holds pairs more than once.

    Args:
        num_pairs: pairs of the data, N.
        global_batch: pairs of a step over all processes and micro-batches, G.
        seed: of the order, not negative.
        shuffle: whether epochs are in a random order; else in that of the source.

    Attributes:
        steps_per_epoch: steps that an epoch lasts: floor(N / G), or N / G < 1.
    """

    steps_per_epoch: float

    def __init__(self, num_pairs: int, global_batch: int, *, seed: int, shuffle: bool = True) -> None:
        self.num_pairs = num_pairs
        self.global_batch = global_batch
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = num_pairs // global_batch or num_pairs / global_batch
        self._used = int(self.steps_per_epoch) * global_batch or num_pairs
        # All epochs of a step and the one before, because negatives are looked up anywhere in the step.
        self._order = lru_cache(maxsize=2 + global_batch // self._used)(self._ordered)

    def at(self, step: int, place: torch.Tensor) -> list[tuple[int, int]]:
        """Find pairs.

        Args:
            step: number of the step, from 0.
            place: (R,) int64 places in the global batch of the step, each in ``[0, global_batch)``.

        Returns:
            The epoch and the pair at each place.
        """
        epochs, positions = np.divmod(step * self.global_batch + place.numpy(), self._used)
        return [
            (epoch, int(self._order(epoch)[position]))
            for epoch, position in zip(epochs.tolist(), positions.tolist(), strict=True)
        ]

    def _ordered(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_pairs)
        generator = torch.Generator().manual_seed(data_seed(self.seed, epoch))
        return torch.randperm(self.num_pairs, generator=generator).numpy()


class WeightedOrder:
    """The pair at each place where several sources give shares of the pairs by weight.

    The pairs of all steps are one stream. Each of its items belongs to one source, so that of any n items in a row a
    source gives its share of n to within a few: as large a share of every global batch, and of every rank's part of it.
    (Drawn at random, the share of a rare source in a batch would vary with its square root.) Each source gives its
    pairs in seeded epochs of its own without gaps: none comes again before all of the source have come. Where a source
    has three times its share of a global batch or more, no global batch has a pair twice.

    Args:
        sizes: pairs of each source; their pairs are numbered one source after another.
        weights: of the sources, positive; only their ratios count.
        global_batch: G, as in ``PairOrder``; the stream does not depend on it, except that the pairs of an epoch that
            begins within a global batch are arranged so that none of the epoch before comes again in it.
        seed: of the order, not negative.

    Attributes:
        steps_per_epoch: (pairs of all sources) / G.
    """

    steps_per_epoch: float

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], global_batch: int, *, seed: int) -> None:
        self.sizes = tuple(sizes)
        self.global_batch = global_batch
        self.seed = seed
        self.steps_per_epoch = sum(sizes) / global_batch
        self._first = np.cumsum([0, *sizes[:-1]])
        # Of what no earlier source takes.
        self._shares = [weight / sum(weights[number:]) for number, weight in enumerate(weights)]
        self._window = [int(global_batch * weight / sum(weights)) + len(weights) + 1 for weight in weights]
        epochs = sum(2 + window // size for window, size in zip(self._window, sizes, strict=True))
        self._order = lru_cache(maxsize=epochs)(self._ordered)

    def at(self, step: int, place: torch.Tensor) -> list[tuple[int, int]]:
        """Find pairs, as ``PairOrder.at``; the epoch is that of the pair's source."""
        index = step * self.global_batch + place.numpy()
        epochs, pairs = np.zeros_like(index), np.zeros_like(index)
        left = np.arange(len(index))
        for source, share in enumerate(self._shares):
            taken, own = take_share(share, index)
            epoch, position = np.divmod(own[taken], self.sizes[source])
            for number in np.unique(epoch):
                at = left[taken][epoch == number]
                epochs[at] = number
                pairs[at] = self._first[source] + self._order(source, int(number))[position[epoch == number]]
            left, index = left[~taken], (index - own)[~taken]
        return list(zip(epochs.tolist(), pairs.tolist(), strict=True))

    def _ordered(self, source: int, epoch: int) -> np.ndarray:
        """The order of an epoch whose first pairs are none of the last of the epoch before.

        Its own last pairs stay where the permutation has them, so an order follows from two permutations alone.
        """
        order, window = self._permutation(source, epoch), self._window[source]
        if epoch == 0 or self.sizes[source] < 3 * window:
            return order
        last = self._permutation(source, epoch - 1)[-window:]
        early = np.flatnonzero(np.isin(order[:window], last))
        free = window + np.flatnonzero(~np.isin(order[window:-window], last))[: len(early)]
        order[early], order[free] = order[free], order[early]
        return order

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(data_seed(self.seed, epoch, source, _WEIGHTED))
        return torch.randperm(self.sizes[source], generator=generator).numpy()


def take_share(share: float, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread a share of a sequence evenly over it.

    Args:
        share: in [0, 1].
        index: (R,) int64, items of the sequence, from 0.

    Returns:
        Whether each item belongs to the share (R,) bool, and how many items before it do (R,) int64.
    """
    before = np.floor(index * share).astype(np.int64)
    return np.floor((index + 1) * share).astype(np.int64) > before, before


def data_seed(*parts: int) -> int:
    """A 64-bit seed that depends on all of these non-negative integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
