"""A digest of the pairs of a source, by which a resumed run notices other data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from sclkern.data.source import PairSource


def digest(source: PairSource) -> str:
    """The digest of a source: its own where it has one, else computed from every distinct caption.

    Args:
        source: any source.

    Returns:
        Hexadecimal digits, the same for the same captions of the same images in the same order.
    """
    own: str | None = getattr(source, "digest", None)
    if own is not None:
        return own
    first = first_pairs(source.pair_group)
    return digest_pairs(source.pair_image, source.pair_group, (source.caption(int(pair)) for pair in first))


def first_pairs(pair_group: np.ndarray) -> np.ndarray:
    """The first pair of each caption text, in the order of the pairs.

    Args:
        pair_group: (num_pairs,) int64, id of each pair's caption text.

    Returns:
        (distinct texts,) int64.
    """
    return np.sort(np.unique(pair_group, return_index=True)[1])


def digest_pairs(pair_image: np.ndarray, pair_group: np.ndarray, texts: Iterable[str]) -> str:
    """Compute the digest of an index.

    Args:
        pair_image: (num_pairs,) int64, image of each pair.
        pair_group: (num_pairs,) int64, id of each pair's caption text; which ids does not matter.
        texts: the texts, in the order of ``first_pairs``.

    Returns:
        Hexadecimal digits.
    """
    _, first, group = np.unique(pair_group, return_index=True, return_inverse=True)
    # Ids depend on the captions of other splits; the order of their first pairs does not.
    place = np.empty(len(first), dtype="<i8")
    place[np.argsort(first)] = np.arange(len(first))
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(np.ascontiguousarray(pair_image, dtype="<i8").tobytes())
    hashed.update(place[group].tobytes())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        hashed.update(len(encoded).to_bytes(8, "little") + encoded)
    return hashed.hexdigest()
