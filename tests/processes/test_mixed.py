"""Steps of images and of clips over ranks: the pairs and weights of one process."""

from __future__ import annotations

import pytest
import torch
from mixed_run import mixed
from ranks import be_rank, run_ranks

from sclkern.data.mixture import kind_of_batch
from sclkern.training.config import load_config
from sclkern.training.logs import SilentLog
from sclkern.training.pretraining import Pretraining
from sclkern.training.world import Place, World

STEPS = 4


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def train(data, runs, rank, world, parallel, contrastive):
    """In float64, the kind and pairs of each micro-batch, and weights and held-out losses after the last."""
    changes = {"run__batch_size": 4 // world, "run__accumulation": 2, "run__parallel": parallel, "run__log_every": 100}
    # No step of images reaches the temporal positions.
    changes |= {"data__normalize": "host", "model__image_temporal": "none"}
    if contrastive:
        changes |= {"run__contrastive_batch": 8}
    output = runs / f"{world}{parallel}{contrastive}"
    arguments = mixed(data, weights=(1, 1, 2), run__output_dir=output, **changes)
    torch.set_default_dtype(torch.float64)
    run = Pretraining(load_config(None, arguments), world=World(Place(rank, world, rank)))
    seen, batches = [], run.batches()

    def recorded():
        for batch in batches:
            seen.append((kind_of_batch(batch), batch["pair"].tolist()))
            yield {name: wide(value) for name, value in batch.items()}

    for _ in range(STEPS):
        run.train_step(recorded(), SilentLog())
    batches.close()
    with run.parallel.whole_model() as model:
        return seen, {name: value.clone() for name, value in model.state_dict().items()}


CASES = [("ddp", False), ("ddp", True), ("fsdp", False)]


def work(rank, world, folder):
    return [train(folder / str(rank), folder, rank, world, *case) for case in CASES]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    for rank in range(2):
        (folder / str(rank)).mkdir()
    return run_ranks(__file__, 2, folder)


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_two_ranks_train_as_one(ranks, tmp_path, case, default_dtype):
    _, contrastive = CASES[case]
    seen, weights = train(tmp_path, tmp_path, 0, 1, "ddp", contrastive)
    assert {kind for kind, _ in seen} == {"images", "clips"} and len(seen) == 2 * STEPS
    for micro, (kind, pairs) in enumerate(seen):
        (own, first), (other, second) = (ranks[rank][case][0][micro] for rank in range(2))
        assert kind == own == other and first + second == pairs
    for rank in range(2):
        for name, value in weights.items():
            torch.testing.assert_close(ranks[rank][case][1][name], value, rtol=1e-9, atol=1e-9, msg=name)


if __name__ == "__main__":
    be_rank(work)
