"""Candidates first, then the others by contrast, then NaN: against a sort of tuples."""

import math
import statistics
from fractions import Fraction

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sclkern.evaluation import ranking
from sclkern.evaluation.gallery import Relevance
from sclkern.evaluation.ranking import summary
from sclkern.evaluation.reranking import Pairs, choose_candidates, pairs_of_candidates, reranked_standings

NUMBERS = st.sampled_from([0.0, -0.0, 0.5, -1.0, 0.25, -math.inf, math.nan])


def level(score, contrast, chosen):
    """By which candidates are sorted; equal ones tie."""
    if chosen:
        return (2, 0) if math.isnan(score) else (0, -score)
    return (2, 0) if math.isnan(contrast) else (1, -contrast)


def by_levels(levels, right):
    """Mean ranks of the first right answer over the orders of ties."""
    best = min(of for of, is_right in zip(levels, right, strict=True) if is_right)
    above, tied = sum(of < best for of in levels), sum(of == best for of in levels)
    equal = sum(of == best and is_right for of, is_right in zip(levels, right, strict=True))
    return above + Fraction(tied + 1, equal + 1)


@given(st.data(), st.booleans(), st.integers(1, 4))
def test_the_order_of_candidates_others_and_nan(data, by_image, count):
    images, texts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    draw = lambda numbers: torch.tensor([[data.draw(numbers) for _ in range(texts)] for _ in range(images)])  # noqa: E731
    contrast, scores, relevant = draw(NUMBERS), draw(NUMBERS), draw(st.booleans())
    # Each query has an answer.
    relevant[:, 0] = relevant[0, :] = True
    relevance = Relevance(*np.nonzero(relevant.numpy()), images, texts)
    candidates = {way: choose_candidates(contrast, count, way) for way in (True, False)}
    pairs = pairs_of_candidates(candidates, texts)
    chosen_scores = scores.flatten()[torch.from_numpy(pairs.chosen)]
    found = summary(reranked_standings(chosen_scores, pairs, candidates[by_image], contrast, relevance, by_image))

    sides = [x if by_image else x.T for x in (scores, contrast, relevant)]
    ranks = []
    for query, chosen in enumerate(candidates[by_image].tolist()):
        of_query = [side[query].tolist() for side in sides]
        levels = [level(s, c, n in chosen) for n, (s, c) in enumerate(zip(*of_query[:2], strict=True))]
        ranks.append(by_levels(levels, of_query[2]))
    assert found["mean_rank"] == float(sum(ranks) / len(ranks))
    assert found["median_rank"] == float(statistics.median(ranks))


def test_nan_is_no_candidate_while_there_is_another():
    contrast = torch.tensor([[math.nan, 0.1, -math.inf, 0.2]])
    assert choose_candidates(contrast, 2, by_image=True).tolist() == [[3, 1]]
    assert choose_candidates(contrast, 9, by_image=True).shape == (1, 4)


def test_pairs_of_both_directions_count_once():
    candidates = {True: torch.tensor([[2], [0]]), False: torch.tensor([[1], [0], [0]])}
    pairs = pairs_of_candidates(candidates, 3)
    # (0, 1), (0, 2) and (1, 0): the pairs of either way are three of the five.
    assert pairs.chosen.tolist() == [1, 2, 3]
    assert [x.tolist() for x in pairs.of_images(0, 1)] == [[0, 0], [1, 2]]
    assert pairs.places(np.array([1, 0]), np.array([0, 1])).tolist() == [2, 0]
    everything = Pairs(3, None)
    assert [x.tolist() for x in everything.of_images(1, 2)] == [[1, 1, 1], [0, 1, 2]]
    assert everything.places(np.array([1]), np.array([2])).tolist() == [5]


def test_parts_of_the_queries_change_nothing(monkeypatch):
    contrast = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).mul(2).round()
    whole = choose_candidates(contrast, 3, by_image=False)
    monkeypatch.setattr(ranking, "_AT_ONCE", 20)
    assert torch.equal(choose_candidates(contrast, 3, by_image=False), whole)
