"""Few batch shapes for captions of many lengths, so that no batch needs a new compilation or a new CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Token counts of a batch that get a size, in standard deviations of the sum above its mean; one more size fits a batch
# of the longest captions.
DEVIATIONS = (0.0, 1.0, 2.0, 4.0)
# Widths and token counts are multiples of these, the tile sizes of kernels and matrix products.
WIDTH_STEP, TOKEN_STEP = 8, 64


@dataclass(frozen=True)
class Buckets:
    """Sizes that batches of captions are padded to.

    Attributes:
        widths: padded caption lengths L, ascending.
        tokens: numbers of packed tokens of a batch, ascending.
    """

    widths: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], batch_size: int, max_text_len: int) -> Buckets:
        """Choose sizes for captions like these.

        Args:
            lengths: tokens of a sample of the captions, special tokens included.
            batch_size: captions in a batch.
            max_text_len: longest caption in tokens.

        Returns:
            Up to three widths and up to five token counts; the largest of both fit every batch.
        """
        counts = np.minimum(np.asarray(lengths, dtype=np.float64), max_text_len)
        mean, deviation = batch_size * counts.mean(), math.sqrt(batch_size) * counts.std()
        most = batch_size * max_text_len
        tokens = {min(_up(mean + d * deviation, TOKEN_STEP), most) for d in DEVIATIONS} | {most}
        # Half of the batches have no caption longer than this; a rare long caption pads its batch to the maximum.
        usual = np.quantile(counts, 0.5 ** (1 / batch_size))
        widths = {min(_up(usual, WIDTH_STEP), max_text_len), min(_up(usual + 1, 2 * WIDTH_STEP), max_text_len)}
        return cls(tuple(sorted(widths | {max_text_len})), tuple(sorted(tokens)))

    def fit(self, longest: int, tokens: int) -> tuple[int, int]:
        """Find the smallest sizes that hold a batch.

        Args:
            longest: tokens of its longest caption.
            tokens: tokens of all its captions.

        Returns:
            A width and a token count.

        Raises:
            ValueError: an argument exceeds the largest size.
        """
        return _smallest("longest", longest, self.widths), _smallest("tokens", tokens, self.tokens)


def _smallest(name: str, needed: int, sizes: tuple[int, ...]) -> int:
    if needed > sizes[-1]:
        raise ValueError(f"{name}: got {needed}, expected at most {sizes[-1]}")
    return next(size for size in sizes if size >= needed)


def _up(value: float, step: int) -> int:
    return step * math.ceil(value / step)
