"""The order of training data: a function of seed, data, global batch, step and place."""

from __future__ import annotations

import pytest
import torch

from sclkern.data.order import PairOrder


def pairs_of(order: PairOrder, step: int) -> list[int]:
    return [pair for _, pair in order.at(step, torch.arange(order.global_batch))]


def test_the_order_is_that_of_the_runs_there_are() -> None:
    # As version 0.1 read them with one process and one batch for a step: two batches an epoch, three pairs left out.
    order = PairOrder(11, 4, seed=3)
    assert [pairs_of(order, step) for step in range(6)] == [
        [2, 3, 4, 5], [7, 10, 8, 6], [5, 8, 1, 7], [9, 0, 3, 10], [5, 6, 1, 4], [3, 8, 10, 9],
    ]  # fmt: skip
    assert [epoch for step in range(5) for epoch, _ in order.at(step, torch.tensor([3]))] == [0, 0, 1, 1, 2]
    large = PairOrder(3_000_000, 4096, seed=42)
    assert large.steps_per_epoch == 732
    assert large.at(2 * 732 + 500, torch.arange(3)) == [(2, 648269), (2, 1716443), (2, 507062)]


def test_an_epoch_has_each_pair_once_and_leaves_out_what_fills_no_step() -> None:
    order = PairOrder(23, 4, seed=0)
    epochs = [
        [pair for step in range(5 * epoch, 5 * epoch + 5) for pair in pairs_of(order, step)] for epoch in range(9)
    ]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 9
    assert {pair for epoch in epochs for pair in epoch} == set(range(23))


def test_few_data_fill_a_step_without_gaps() -> None:
    order = PairOrder(5, 12, seed=0)
    assert order.steps_per_epoch == 5 / 12
    stream = [at for step in range(5) for at in order.at(step, torch.arange(12))]
    assert [epoch for epoch, _ in stream] == [position // 5 for position in range(60)]
    assert all(sorted(pair for e, pair in stream if e == epoch) == [0, 1, 2, 3, 4] for epoch in range(12))


@pytest.mark.parametrize(("pairs", "global_batch"), [(23, 4), (5, 12), (12, 12)])
def test_places_may_be_asked_for_in_any_order(pairs: int, global_batch: int) -> None:
    whole = [PairOrder(pairs, global_batch, seed=1).at(step, torch.arange(global_batch)) for step in range(9)]
    order = PairOrder(pairs, global_batch, seed=1)
    for step in (8, 0, 5, 3):
        place = torch.randperm(global_batch)
        assert order.at(step, place) == [whole[step][at] for at in place.tolist()]


def test_the_order_of_the_source() -> None:
    order = PairOrder(7, 3, seed=1, shuffle=False)
    assert [pairs_of(order, step) for step in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_the_order_of_an_epoch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    ordered = PairOrder._ordered
    monkeypatch.setattr(PairOrder, "_ordered", lambda self, epoch: made.append(epoch) or ordered(self, epoch))
    for pairs, global_batch in ((40, 4), (5, 12)):
        order = PairOrder(pairs, global_batch, seed=0)
        for step in range(20):
            for _ in range(2):  # once for the rows, once for their negatives
                pairs_of(order, step)
        assert len(made) == len(set(made))
        made.clear()
