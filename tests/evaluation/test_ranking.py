"""Recalls and ranks against an enumeration of every order of ties."""

import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sclkern.evaluation import ranking
from sclkern.evaluation.ranking import recall, recall_of_relevant, rsum


def by_enumeration(scores, query_groups, candidate_groups, ks):
    """The mean over every order of the candidates that the scores allow, in fractions: nothing of ours in it."""
    ranks, hits = [], {k: [] for k in ks}
    for row, group in zip(scores, query_groups, strict=True):
        key = [(1, 0.0) if math.isnan(x) else (0, -x) for x in row]
        orders = [
            order
            for order in itertools.permutations(range(len(row)))
            if all(key[a] <= key[b] for a, b in itertools.pairwise(order))
        ]
        first = [1 + next(i for i, c in enumerate(order) if candidate_groups[c] == group) for order in orders]
        ranks.append(Fraction(sum(first), len(first)))
        for k in ks:
            hits[k].append(Fraction(sum(rank <= k for rank in first), len(first)))
    return {
        **{f"r{k}": float(sum(of_k) / len(of_k)) for k, of_k in hits.items()},
        "median_rank": float(statistics.median(ranks)),
        "mean_rank": float(sum(ranks) / len(ranks)),
    }


NUMBERS = st.sampled_from([0.0, -0.0, 0.5, 0.5, -1.0, 2.0, math.inf, -math.inf, math.nan, math.nan])


@given(st.data())
def test_every_order_of_ties_counts_alike(data):
    queries, candidates = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.lists(NUMBERS, min_size=candidates, max_size=candidates),
                                min_size=queries, max_size=queries))  # fmt: skip
    of_candidates = data.draw(st.lists(st.integers(0, 2), min_size=candidates, max_size=candidates))
    of_queries = data.draw(st.lists(st.sampled_from(of_candidates), min_size=queries, max_size=queries))
    ks = (1, 2, 5, 10)
    assert recall(torch.tensor(scores), of_queries, of_candidates, ks) == by_enumeration(
        scores, of_queries, of_candidates, ks
    )


def test_a_constant_score_gives_chance():
    five = [group for group in range(1000) for _ in range(5)]
    found = recall(torch.zeros(1000, 5000), range(1000), five)
    for k in (1, 5, 10):
        # 5 of 5,000 captions are right: 1 minus the chance that k draws without replacement miss all.
        miss = math.prod(Fraction(4995 - i, 5000 - i) for i in range(k))
        assert found[f"r{k}"] == float(1 - miss)
    assert found["mean_rank"] == found["median_rank"] == float(Fraction(5001, 6))
    assert recall(torch.full((5000, 1000), math.nan), five, range(1000))["r1"] == 0.001


def test_nan_stands_behind_minus_infinity():
    scores = torch.tensor([[math.nan, -math.inf, 0.0]])
    assert [recall(scores, [0], groups)["mean_rank"] for groups in ([0, 1, 1], [1, 0, 1], [1, 1, 0])] == [3, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_are_compared_as_they_are(dtype):
    # In half precision 2048 and 2049 are one number; so they tie, and nothing else does.
    scores = torch.tensor([[2048.0, 2049.0, 1.0]]).to(dtype)
    expected = 1.5 if scores[0, 0] == scores[0, 1] else 2.0
    assert recall(scores, [0], [0, 1, 1])["mean_rank"] == expected
    assert recall(scores.float(), [0], [0, 1, 1])["mean_rank"] == expected


def test_scores_of_double_precision_do_not_tie_in_single():
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert recall(scores, [0], [0, 1])["r1"] == 0


def test_duplicate_captions_are_all_right():
    # Pictures 0 and 1 have the same caption, which stands twice among the candidates with the same score.
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.8, 0.8, 0.9]])
    assert recall(scores, ["cat", "cat"], ["cat", "cat", "dog"], (1,))["r1"] == 0.5
    # As captions of two pictures, one of them is right: the tie is even.
    assert recall(scores[:1], [0], [0, 1, 2], (1,))["r1"] == 0.5


def test_any_of_five_captions_counts_and_their_order_does_not():
    generator = torch.Generator().manual_seed(3)
    groups = torch.arange(7).repeat_interleave(5)
    scores = torch.randn(7, 35, generator=generator)
    by_hand = [min(int((row > row[i]).sum()) for i in range(5 * q, 5 * q + 5)) + 1 for q, row in enumerate(scores)]
    found = recall(scores, torch.arange(7), groups, (1, 3))
    assert found["mean_rank"] == float(Fraction(sum(by_hand), 7)) and found["median_rank"] == statistics.median(by_hand)
    assert found["r3"] == sum(rank <= 3 for rank in by_hand) / 7
    # A group whose captions stand far apart, as after a gather from ranks that each hold some.
    order = torch.randperm(35, generator=generator)
    assert recall(scores[:, order], torch.arange(7), groups[order], (1, 3)) == found


def test_parts_change_nothing(monkeypatch):
    scores = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).mul(3).round()
    whole = recall(scores[:30], range(30), range(30))
    monkeypatch.setattr(ranking, "_AT_ONCE", 70)
    assert recall(scores[:30], range(30), range(30)) == whole
    # Columns of a matrix on disk are queries too.
    assert recall(scores[:30].numpy().T, range(30), range(30)) == recall(
        scores[:30].T.contiguous(), range(30), range(30)
    )


def test_relations_that_are_no_groups():
    relevant = torch.tensor([[True, True, False], [False, True, True]])
    assert recall_of_relevant(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]), relevant, (1, 2)) == {
        "r1": 0.0, "r2": 1.0, "median_rank": 2.0, "mean_rank": 2.0,
    }  # fmt: skip


def test_rsum_adds_six_recalls():
    text, image = recall(torch.eye(12), range(12), range(12)), recall(torch.zeros(12, 12), range(12), range(12))
    assert rsum(text, image) == math.fsum([1, 1, 1, 1 / 12, 5 / 12, 10 / 12])


def test_more_candidates_wanted_than_there_are():
    assert recall(torch.zeros(2, 3), [0, 1], [0, 1, 1])["r5"] == 1


ONE = torch.zeros(1, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), [0], [0]), ValueError, r"similarity: got shape \(3,\), expected \(queries, candidates\)"),
        ((torch.zeros(0, 3), [], [0, 1, 2]), ValueError, "similarity: .* one or more of each"),
        ((torch.zeros(2, 0), [0, 1], []), ValueError, "similarity: .* one or more of each"),
        ((torch.zeros(1, 1, dtype=torch.bool), [0], [0]), TypeError, "similarity: got torch.bool"),
        ((torch.zeros(1, 1, dtype=torch.complex64), [0], [0]), TypeError, "similarity: got torch.complex64"),
        ((torch.zeros(2, 3), [0], [0, 1, 2]), ValueError, "query_groups: got 1, expected .* 2 rows"),
        ((torch.zeros(2, 3), [0, 1], [0, 1]), ValueError, "candidate_groups: got 2, expected .* 3 columns"),
        ((torch.zeros(2, 2), [0, 5], [0, 1]), ValueError, r"query_groups: .* query 1 .* \(1 such queries\)"),
        ((ONE, [0.5], [0.5]), TypeError, "query_groups: got float64, expected integers or strings"),
        ((ONE, ["a"], [0]), TypeError, "candidate_groups: got integers beside strings"),
        ((ONE, [[0]], [0]), ValueError, r"query_groups: got shape \(1, 1\)"),
        ((ONE, [0], [0], ()), ValueError, r"ks: got \(\), expected integers from 1"),
        ((ONE, [0], [0], (0,)), ValueError, r"ks: got \(0,\)"),
        ((ONE, [0], [0], (1.5,)), ValueError, r"ks: got \(1.5,\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        recall(*arguments)


def test_a_relation_needs_a_right_answer_for_each():
    with pytest.raises(ValueError, match="relevant: got no right answer for query 1"):
        recall_of_relevant(torch.zeros(2, 1), torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match=r"relevant: got torch.bool of shape \(1, 1\), expected bool of \(2, 1\)"):
        recall_of_relevant(torch.zeros(2, 1), torch.ones(1, 1, dtype=torch.bool))


def test_large_group_numbers_stay_apart():
    big = 2**62
    assert recall(torch.eye(2), np.array([big, big + 1], dtype=np.uint64), [big, big + 1])["r1"] == 1
