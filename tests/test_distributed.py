"""Contrast over ranks; ``python test_distributed.py RANK WORLD DIRECTORY`` is the program of each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import sclkern
from sclkern.distributed import gather
from sclkern.objectives import losses as L

ROWS, FRAMES, TOKENS, WIDTH = 4, 2, 3, 5
CASES = [*product(["itc", "mvsc", "mlsc", "mltc"], ["exact", "reference"], ["all", "reference"])]


def samples(world):
    """Inputs of all ranks, a map that is shared by them, and its learnable temperature."""
    generator = torch.Generator().manual_seed(world)
    shape = (2, world * ROWS, FRAMES * TOKENS, WIDTH)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    valid = torch.rand(world * ROWS, FRAMES * TOKENS, generator=generator) < 0.6
    # A rank without any token: its part of the mean is empty, not wrong.
    valid[:ROWS] = False
    weight = torch.randn(2, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, valid, weight


def evaluate(name, gather, negatives, inputs, valid, weight):
    """The loss, and its gradients by the shared map, the temperature and the mapped features."""
    weight = weight.clone().requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    features = [x @ w for x, w in zip(inputs, weight, strict=True)]
    recovered, complete = features
    options = {"temperature": temperature, "gather": gather}
    if name == "itc":
        loss = L.image_text_contrast(recovered[:, 0], complete[:, 0], temperature, gather=gather)
    elif name == "mvsc":
        loss = L.masked_vision_semantic_completion(recovered[:, :FRAMES], complete[:, :FRAMES], **options)
    elif name == "mlsc":
        loss = L.masked_language_semantic_completion(recovered[:, 0], complete[:, 0], negatives=negatives, **options)
    else:
        loss = L.masked_local_token_completion(recovered, complete, valid, negatives=negatives, **options)
    gradients = torch.autograd.grad(loss, [weight, temperature, recovered])
    return {"loss": loss.detach(), **dict(zip(("weight", "temperature", "features"), gradients, strict=True))}


def work(rank, world, directory):
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    inputs, valid, weight = samples(world)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    results = {case: evaluate(*case, inputs[:, own], valid[own], weight) for case in CASES}
    results["integers"] = gather(torch.tensor([rank, 10 + rank]))
    results["bools"] = gather(torch.tensor([rank == 0]))
    # A transposed input: rows that do not lie one after the other.
    results["strided"] = gather((torch.arange(6.0).view(3, 2) + 100 * rank).T)
    groups = [dist.new_group([member]) for member in range(world)]
    results["alone"] = gather(torch.tensor([float(rank)]), groups[rank])
    torch.save(results, directory / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    """The results of each rank."""
    world, directory = request.param, tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(filter(None, [str(Path(sclkern.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(directory)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, f"rank {rank}: {output}"
    finally:
        for process in processes:
            process.kill()
    return [torch.load(directory / f"{rank}.pt") for rank in range(world)]


def mean(ranks, case, name):
    return sum(results[case][name] for results in ranks) / len(ranks)


def big_batch(world, name):
    return evaluate(name, "exact", "all", *samples(world))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


LOSSES = ["itc", "mvsc", "mlsc", "mltc"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_rank_has_the_loss_of_the_big_batch(ranks, name):
    for results, mode in product(ranks, ["exact", "reference"]):
        close(results[name, mode, "all"]["loss"], big_batch(len(ranks), name)["loss"])


@pytest.mark.parametrize("name", LOSSES)
def test_exact_gradients_average_to_those_of_the_big_batch(ranks, name):
    expected = big_batch(len(ranks), name)
    for parameter in ("weight", "temperature"):
        close(mean(ranks, (name, "exact", "all"), parameter), expected[parameter])


@pytest.mark.parametrize("name", LOSSES)
def test_an_exact_feature_gradient_is_world_times_its_slice(ranks, name):
    expected = big_batch(len(ranks), name)["features"].split(ROWS)
    for results, own in zip(ranks, expected, strict=True):
        close(results[name, "exact", "all"]["features"], len(ranks) * own)


@pytest.mark.parametrize("name", LOSSES)
def test_reference_feature_gradients_are_the_slices_themselves(ranks, name):
    expected = big_batch(len(ranks), name)
    for results, own in zip(ranks, expected["features"].split(ROWS), strict=True):
        close(results[name, "reference", "all"]["features"], own)
    # What DDP then averages is 1/world of the big batch's gradient.
    close(mean(ranks, (name, "reference", "all"), "weight"), expected["weight"] / len(ranks))


@pytest.mark.parametrize("mode", ["exact", "reference"])
@pytest.mark.parametrize("name", ["mlsc", "mltc"])
def test_reference_negatives_are_those_of_the_rank(ranks, name, mode):
    inputs, valid, weight = samples(len(ranks))
    for rank, results in enumerate(ranks):
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        alone = evaluate(name, "exact", "all", inputs[:, own], valid[own], weight)
        for key, value in alone.items():
            close(results[name, mode, "reference"][key], value)


def test_rows_are_stacked_rank_by_rank(ranks):
    world = len(ranks)
    for rank, results in enumerate(ranks):
        assert results["integers"].tolist() == [x for r in range(world) for x in (r, 10 + r)]
        assert results["bools"].tolist() == [r == 0 for r in range(world)]
        assert results["strided"].tolist() == [
            [100 * r + x for x in row] for r in range(world) for row in ([0, 2, 4], [1, 3, 5])
        ]
        assert results["alone"].tolist() == [rank]


def test_one_process_gathers_nothing():
    features = torch.randn(3, 2, requires_grad=True)
    assert gather(features) is features


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
