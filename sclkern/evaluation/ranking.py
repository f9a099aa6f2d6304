"""Recall and rank of the right answers among scored candidates.

Ties: equal scores stand in any order with equal chance, and what is returned is the expectation over these orders, so a
constant score gives chance. 0.0 and -0.0 are equal. NaN stands behind every number, -inf too, and NaNs are equal.
Everything is computed from counts, in exact fractions that are rounded once: no order of summation shows.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
# Scores that are compared at a time.
_AT_ONCE = 2**24


class Standing(NamedTuple):
    """Where the best right answer of a query stands.

    Attributes:
        above: candidates with higher scores.
        tied: candidates with its score, itself too.
        right: right answers among these.
    """

    above: int
    tied: int
    right: int

    def within(self, k: int) -> Fraction:
        """Chance that a right answer is among the first ``k``."""
        wrong, room = self.tied - self.right, k - self.above
        if room <= 0:
            return Fraction(0)
        if room > wrong:
            return Fraction(1)
        return 1 - Fraction(math.comb(wrong, room), math.comb(self.tied, room))

    def rank(self) -> Fraction:
        """Expected rank of the first right answer, from 1."""
        return self.above + Fraction(self.tied + 1, self.right + 1)


def recall(
    similarity: Any, query_groups: Any, candidate_groups: Any, ks: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Recall at each k, and the ranks: a query is answered by any candidate of its group.

    The best of a query's right answers counts. The rule for ties and NaN is that of this module.

    Args:
        similarity: (Q, N) scores, higher is better; those of half precision are compared in float32.
        query_groups: (Q,) int or str, the group of each query.
        candidate_groups: (N,) likewise; those of groups that no query has answer none.
        ks: how many first candidates are looked at.

    Returns:
        ``r<k>`` for each k, the share of queries with a right answer among the first k, in [0, 1]; ``median_rank`` and
        ``mean_rank`` of the first right answer, from 1.

    Raises:
        TypeError: scores or groups of another kind.
        ValueError: other shapes, no query, a query whose group no candidate has, or a k below 1.
    """
    scores = _scores(similarity)
    queries, candidates = _numbered(query_groups, candidate_groups)
    for name, groups, count, of in (
        ("query_groups", queries, scores.shape[0], "rows"),
        ("candidate_groups", candidates, scores.shape[1], "columns"),
    ):
        if len(groups) != count:
            raise ValueError(f"{name}: got {len(groups)}, expected one for each of the {count} {of} of similarity")
    alone = ~np.isin(queries, candidates)
    if alone.any():
        raise ValueError(
            f"query_groups: got a group for query {int(alone.argmax())} that no candidate has ({int(alone.sum())} such "
            "queries), expected a right answer for each; leave out the queries without"
        )
    rows, columns = (torch.from_numpy(groups).to(scores.device) for groups in (queries, candidates))
    return summary(_all_standings(scores, lambda part: rows[part, None] == columns), ks)


def recall_of_relevant(scores: Any, relevant: Tensor, ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """``recall`` where groups cannot say what answers what: a query and a candidate may each have several of the other.

    Args:
        scores: (Q, N), as ``similarity`` of ``recall``.
        relevant: (Q, N) bool, the right answers.
        ks: as in ``recall``.

    Returns:
        As ``recall``.

    Raises:
        TypeError: as ``recall``.
        ValueError: as ``recall``.
    """
    scores = _scores(scores)
    if relevant.shape != scores.shape or relevant.dtype != torch.bool:
        raise ValueError(
            f"relevant: got {relevant.dtype} of shape {tuple(relevant.shape)}, expected bool of {tuple(scores.shape)}"
        )
    alone = ~relevant.any(1)
    if alone.any():
        raise ValueError(f"relevant: got no right answer for query {int(alone.int().argmax())}, expected one or more")
    return summary(_all_standings(scores, lambda part: relevant[part]), ks)


def rsum(*directions: Mapping[str, float]) -> float:
    """The sum of the recalls at 1, 5 and 10, of both directions in the field's use.

    Args:
        *directions: of ``recall``, one for each direction.

    Returns:
        At most 3 for each direction.
    """
    return math.fsum(of[f"r{k}"] for of in directions for k in RECALL_AT)


def standings(scores: Tensor, relevant: Tensor, present: Tensor | None = None) -> list[Standing]:
    """Where the best right answer of each query stands.

    Args:
        scores: (Q, N).
        relevant: (Q, N) bool, one or more a query, among those that are present.
        present: (Q, N) bool, the candidates; None is all of them.

    Returns:
        One for each query.
    """
    number, nan = ~scores.isnan(), scores.isnan()
    if present is not None:
        number, nan, relevant = number & present, nan & present, relevant & present
    of_numbers = relevant & number
    best = torch.where(of_numbers, scores, -torch.inf).amax(1, keepdim=True)
    # A query whose right answers are all NaN stands behind all numbers. NaN equals and exceeds nothing.
    ranked = of_numbers.any(1, keepdim=True)
    above = torch.where(ranked, (scores > best) & number, number)
    tied = torch.where(ranked, (scores == best) & number, nan)
    counts = torch.stack([mask.sum(1) for mask in (above, tied, tied & relevant)], 1)
    return [Standing(*row) for row in counts.tolist()]


def row_parts(scores: Tensor) -> list[slice]:
    """Rows that are compared at a time."""
    rows = max(1, _AT_ONCE // scores.shape[1])
    return [slice(start, min(start + rows, len(scores))) for start in range(0, len(scores), rows)]


def summary(found: Iterable[Standing], ks: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Recalls and ranks.

    Args:
        found: of each query.
        ks: as in ``recall``.

    Returns:
        As ``recall``.

    Raises:
        ValueError: a k below 1.
    """
    if not len(ks) or not all(isinstance(k, int | np.integer) and k >= 1 for k in ks):
        raise ValueError(f"ks: got {ks!r}, expected integers from 1")
    counts = Counter(found)
    ranks = sorted((one.rank(), count) for one, count in counts.items())
    return {
        **{f"r{k}": _mean((one.within(int(k)), count) for one, count in counts.items()) for k in ks},
        "median_rank": _median(ranks),
        "mean_rank": _mean(ranks),
    }


def _all_standings(scores: Tensor, relevant: Callable[[slice], Tensor]) -> Iterator[Standing]:
    for part in row_parts(scores):
        yield from standings(scores[part], relevant(part))


def _mean(values: Iterable[tuple[Fraction, int]]) -> float:
    total, rows = Fraction(0), 0
    for value, count in values:
        total, rows = total + value * count, rows + count
    return float(total / rows)


def _median(ascending: list[tuple[Fraction, int]]) -> float:
    rows = sum(count for _, count in ascending)
    ends = list(itertools.accumulate(count for _, count in ascending))
    middle = [ascending[bisect.bisect_right(ends, place)][0] for place in ((rows - 1) // 2, rows // 2)]
    return float(sum(middle, Fraction(0)) / 2)


def _scores(scores: Any) -> Tensor:
    found = torch.as_tensor(scores)
    if found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"similarity: got {found.dtype}, expected real numbers")
    if found.ndim != 2 or not found.numel():
        raise ValueError(
            f"similarity: got shape {tuple(found.shape)}, expected (queries, candidates), one or more of each"
        )
    if not found.is_floating_point():
        return found.double()
    return found if found.dtype in (torch.float32, torch.float64) else found.float()


def _numbered(query_groups: Any, candidate_groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Groups as numbers: equal where the groups are."""
    arrays = []
    for name, groups in (("query_groups", query_groups), ("candidate_groups", candidate_groups)):
        array = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
        if array.ndim != 1:
            raise ValueError(f"{name}: got shape {array.shape}, expected one dimension")
        if array.dtype.kind not in "iuU" and array.size:
            raise TypeError(f"{name}: got {array.dtype}, expected integers or strings")
        # Of int64 and uint64 together numpy would make floats.
        arrays.append(array.astype(np.int64) if array.dtype.kind in "iu" else array)
    kinds = {array.dtype.kind == "U" for array in arrays if array.size}
    if len(kinds) > 1:
        raise TypeError("candidate_groups: got integers beside strings in query_groups, expected the same kind of both")
    _, numbers = np.unique(np.concatenate(arrays), return_inverse=True)
    return numbers[: len(arrays[0])], numbers[len(arrays[0]) :]
