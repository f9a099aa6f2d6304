"""A global batch over ranks; ``python test_step_over_ranks.py RANK WORLD DIRECTORY`` is the program of each rank."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from global_batch import ROWS, SEED, assert_close, global_batch, gradients_of, one_batch, part_of, train
from ranks import be_rank, run_ranks

from sclkern import ObjectiveConfig, SCLConfig
from sclkern.step import StepConfig, contrast_batch, target_counts
from sclkern.step.memory import estimate_memory

WORLD, ACCUMULATION = 2, 2
SIZE = ROWS // WORLD // ACCUMULATION
CASES = {"images": ("glscl", "in_batch", None), "clips": ("scl", "dataset", 3)}


def rows_of(rank, micro):
    first = (micro * WORLD + rank) * SIZE
    return range(first, first + SIZE)


def averaged(losses, gradients):
    """Over the ranks, as DDP does."""
    for tensor in (*losses.values(), *gradients.values()):
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return losses, gradients


def step(model, batches, contrastive):
    """The micro-batches of one rank: contrast over all of them, or each over the ranks."""
    model.zero_grad()
    contrasts = contrast_batch(model, batches, SEED) if contrastive else [None] * len(batches)
    mean = {}
    for batch, contrast in zip(batches, contrasts, strict=True):
        counted = batches if contrastive else [batch]
        counts = target_counts(model.config, model.objectives, counted, SEED)
        losses = model(batch, seed=SEED, counts=counts, contrast=contrast)
        (losses.total / len(batches)).backward()
        for name, loss in losses.named().items():
            mean[name] = mean.get(name, 0) + loss.detach() / len(batches)
    return averaged(mean, gradients_of(model))


def alone(model, batch):
    """Losses without any collective, though there is a process group."""
    model.objectives = dataclasses.replace(model.objectives, gather=None)
    collectives = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_reduce")}
    try:
        for name in collectives:
            setattr(dist, name, None)
        return {name: loss.detach() for name, loss in model(batch, seed=SEED).named().items()}
    finally:
        for name, collective in collectives.items():
            setattr(dist, name, collective)


def estimate():
    config = SCLConfig.preset("tiny").replace(text_layers=1, vision_layers=1, fusion_layers=1)
    return estimate_memory(config, ObjectiveConfig(), StepConfig(), rows=4, padded_tokens=16, world_size=WORLD)


def work(rank, _, directory):
    results = {}
    for name in CASES:
        model, batch = torch.load(directory / f"{name}.pt", weights_only=False)
        parts = [part_of(batch, rows_of(rank, micro)) for micro in range(ACCUMULATION)]
        for contrastive in (True, False):
            results[name, contrastive] = step(model, parts, contrastive)
        results[name, "alone"] = alone(model, parts[0])
    return {**results, "memory": estimate()}


@pytest.fixture(scope="module")
def cases(make_model, make_batch):
    return {
        name: (train(make_model, recipe, negatives, frames), global_batch(make_batch, negatives, frames))
        for name, (recipe, negatives, frames) in CASES.items()
    }


@pytest.fixture(scope="module")
def ranks(cases, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    for name, case in cases.items():
        torch.save(case, directory / f"{name}.pt")
    return run_ranks(__file__, WORLD, directory)


@pytest.mark.parametrize("name", CASES)
def test_a_contrastive_batch_over_ranks_equals_one_big_batch(cases, ranks, name):
    expected = one_batch(*cases[name])
    for results in ranks:
        assert_close(results[name, True], expected)


@pytest.mark.parametrize("name", CASES)
def test_without_it_ranks_equal_one_process_with_their_rows(cases, ranks, name):
    model, batch = cases[name]
    rows = [[*rows_of(0, micro), *rows_of(1, micro)] for micro in range(ACCUMULATION)]
    whole = [one_batch(model, part_of(batch, of_micro)) for of_micro in rows]
    expected = [{key: sum(part[key] for part in parts) / len(whole) for key in parts[0]}
                for parts in zip(*whole, strict=True)]  # fmt: skip
    for results in ranks:
        assert_close(results[name, False], expected)


@pytest.mark.parametrize("name", CASES)
def test_without_gathering_a_rank_computes_what_it_would_alone(cases, ranks, name):
    model, batch = cases[name]
    for rank, results in enumerate(ranks):
        losses, _ = one_batch(model, part_of(batch, rows_of(rank, 0)))
        assert_close([results[name, "alone"]], [losses])


def test_the_memory_of_a_step_is_estimated_within_a_process_group(ranks):
    assert [results["memory"] for results in ranks] == [estimate()] * WORLD


if __name__ == "__main__":
    be_rank(work)
