"""Few shapes for captions of many lengths, so that nothing is compiled or captured again for every batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Room for the tokens of a batch, as deviations of their sum above its mean; then for the longest captions there are.
DEVIATIONS = (0.0, 1.0, 2.0, 4.0)
# Widths and token counts are multiples of these: tiles of the kernels and of matrix products.
WIDTH_STEP, TOKEN_STEP = 8, 64


@dataclass(frozen=True)
class Buckets:
    """Sizes that batches of captions are padded to.

    Attributes:
        widths: padded caption lengths L, ascending. tokens: numbers of packed tokens of a batch, ascending.
    """

    widths: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], batch_size: int, max_text_len: int) -> Buckets:
        """Choose sizes for captions like these.

        Args:
            lengths: tokens of a sample of the captions, special tokens included. max_text_len: no caption is longer.
        """
        counts = np.minimum(np.asarray(lengths, dtype=np.float64), max_text_len)
        mean, deviation = batch_size * counts.mean(), math.sqrt(batch_size) * counts.std()
        most = batch_size * max_text_len
        tokens = {min(_up(mean + d * deviation, TOKEN_STEP), most) for d in DEVIATIONS} | {most}
        # The longest of a batch, most of the time; a rare long caption pads its batch to all there is.
        usual = np.quantile(counts, 0.5 ** (1 / batch_size))
        widths = {min(_up(usual, WIDTH_STEP), max_text_len), min(_up(usual + 1, 2 * WIDTH_STEP), max_text_len)}
        return cls(tuple(sorted(widths | {max_text_len})), tuple(sorted(tokens)))

    def fit(self, longest: int, tokens: int) -> tuple[int, int]:
        """The smallest width and the smallest room that hold them.

        Raises:
            ValueError: they are larger than any.
        """
        found = []
        for name, size, sizes in (("longest", longest, self.widths), ("tokens", tokens, self.tokens)):
            fitting = [each for each in sizes if each >= size]
            if not fitting:
                raise ValueError(f"{name}: got {size}, expected at most {sizes[-1]}")
            found.append(fitting[0])
        return found[0], found[1]


def _up(value: float, step: int) -> int:
    return step * math.ceil(value / step)
