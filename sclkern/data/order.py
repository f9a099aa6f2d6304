"""Which pair stands where: the order of training data as a function of the seed, the data and the global batch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch


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


def data_seed(*parts: int) -> int:
    """A 64-bit seed that depends on all of these non-negative integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
