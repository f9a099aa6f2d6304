"""Steps of images and of clips over ranks: the pairs and weights of one process."""

from __future__ import annotations

import pytest
import torch
from mixed_run import mixed
from ranks import be_rank, run_ranks

from sclkern.training.config import load_config
from sclkern.training.logs import SilentLog
from sclkern.training.loop import Pretraining
from sclkern.training.world import Place, World

STEPS = 4


def train(folder, rank, world, parallel, contrastive):
    """The kind and pairs of each step, and the weights after the last."""
    changes = {"run__batch_size": 4 // world, "run__accumulation": 2, "run__parallel": parallel, "run__log_every": 100}
    if contrastive:
        changes |= {"run__contrastive_batch": 8}
    arguments = mixed(folder, weights=(1, 1, 2), run__output_dir=folder / f"{world}{parallel}{contrastive}", **changes)
    run = Pretraining(load_config(None, arguments), world=World(Place(rank, world, rank)))
    seen, batches = [], run.batches()
    for _ in range(STEPS):
        run.train_step(batches, SilentLog())
        seen.append((run._batch["image"].ndim, run._batch["pair"].tolist()))
    batches.close()
    run.model.eval()
    with run.passes.whole_model():
        losses = run.evaluation.held_out_losses()
        weights = {name: value.clone() for name, value in run.passes.model.state_dict().items()}
    return seen, weights, losses


CASES = [("ddp", False), ("ddp", True), ("fsdp", False)]


def work(rank, world, folder):
    return [train(folder / str(rank), rank, world, *case) for case in CASES]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    for rank in range(2):
        (folder / str(rank)).mkdir()
    return run_ranks(__file__, 2, folder)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_two_ranks_train_as_one(ranks, tmp_path, case):
    _, contrastive = CASES[case]
    seen, weights, losses = train(tmp_path, 0, 1, "ddp", contrastive)
    assert {kind for kind, _ in seen} == {4, 5}
    for step in range(STEPS):
        (kind, first), (other, second) = (ranks[rank][case][0][step] for rank in range(2))
        assert kind == other == seen[step][0] and first + second == seen[step][1]
    for rank in range(2):
        for name, value in weights.items():
            torch.testing.assert_close(ranks[rank][case][1][name], value, rtol=2e-4, atol=2e-5, msg=name)
        assert ranks[rank][case][2] == pytest.approx(losses, rel=1e-3)


if __name__ == "__main__":
    be_rank(work)
