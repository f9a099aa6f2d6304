"""Texts in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class PackedTexts(Sequence[str]):
    """A sequence of texts that processes share, and that is sent to another one at the cost of its bytes.

    A list of str has a counter in each of its elements: a worker that reads them writes to the memory it shares with
    its parent, page after page, until it has a copy of all.

    Args:
        texts: The texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """The text of an index, or those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._bytes[self._ends[number] : self._ends[number + 1]].tobytes().decode("utf-8", "surrogatepass")
