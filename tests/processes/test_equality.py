"""Any number of processes trains as one does: losses of ten steps, and the weights after them.

``python test_equality.py RANK WORLD FOLDER`` is the program of each rank; it trains every case of its world.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from ranks import be_rank, run_ranks

import sclkern
from sclkern.training.config import load_config
from sclkern.training.logs import SilentLog
from sclkern.training.parallel import share_model
from sclkern.training.pretraining import Pretraining
from sclkern.training.world import Place, World
from tiny_run import overrides, small_data

STEPS, PAIRS = 10, 50
SMALL = {
    "model__text_layers": 1, "model__vision_layers": 1, "model__fusion_layers": 1, "model__dropout": 0.1,
    "model__heads": "[itm, mlm, itc, rank]", "optimizer__learning_rate": 1e-4, "optimizer__warmup": 0.0,
    # Of some parameters, such as biases of keys, the gradient is rounding errors: AdamW must not blow them up.
    "optimizer__eps": 1e-6, "optimizer__max_grad_norm": 20.0, "run__max_steps": STEPS, "run__log_every": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    parallel: str
    accumulation: int
    contrastive: bool
    recipe: str
    frames: int
    negatives: str
    dtype: str

    def name(self):
        return "-".join(map(str, vars(self).values()))

    def global_batch(self, world):
        return 12 if 12 % (world * self.accumulation) == 0 else 24

    def alone(self):
        """What one process trains in its place: with a contrastive batch, the whole batch at once."""
        accumulation = 1 if self.contrastive else self.accumulation
        return replace(self, parallel="ddp", accumulation=accumulation, contrastive=False)


# Every two values of two factors meet, by an orthogonal array.
LEVELS = [("ddp", "fsdp"), (1, 2), (False, True), ("scl", "glscl"), (1, 2), ("in_batch", "dataset"),
          ("float64", "float32")]  # fmt: skip
ARRAY = [[sum(row >> bit & mask >> bit & 1 for bit in range(3)) % 2 for mask in range(1, 8)] for row in range(8)]
CASES = [Case(*(levels[level] for levels, level in zip(LEVELS, row, strict=True))) for row in ARRAY]
HARDEST = Case("fsdp", 2, True, "glscl", 2, "dataset", "float64")
# Two processes train all; three and four a half each, with both values of every factor.
CASES_OF = {2: [*CASES, HARDEST], 3: [*(CASES[row] for row in (0, 1, 2, 4)), HARDEST],
            4: [*(CASES[row] for row in (3, 5, 6, 7)), HARDEST]}  # fmt: skip


class Recorder(SilentLog):
    def __init__(self):
        self.rows = []

    def write(self, kind, step, values):
        of_computer = ("second", "memory", "slowest")
        self.rows.append({k: value for k, value in values.items() if not any(word in k for word in of_computer)})


def configuration(case, world, rows, folder):
    """``rows``: the global batch."""
    return load_config(
        None,
        overrides(
            folder / f"{world}-{rows}-{case.name()}",
            **SMALL,
            data__root=folder, data__train_tables="[t]", data__val_tables="[t]", data__val_split="train",
            data__normalize="host",
            run__parallel=case.parallel, run__accumulation=case.accumulation,
            run__batch_size=rows // (world * case.accumulation),
            run__contrastive_batch=rows if case.contrastive else "null",
            objectives__recipe=case.recipe, objectives__itm_negatives=case.negatives,
            model__max_frames=case.frames if case.frames > 1 else 0,
        ),
    )  # fmt: skip


def as_case_wants(batch, case):
    for name in {"image", "false_image"} & set(batch):
        image = batch[name].to(getattr(torch, case.dtype))
        batch[name] = image if case.frames == 1 else torch.stack([image, image.flip(-1)], dim=1)
    return batch


def train(case, config, world):
    """Losses and other values of each step, and the whole model's weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.dtype))
    try:
        run, recorder = Pretraining(config, world=world), Recorder()
        batches = (as_case_wants(batch, case) for batch in run.batches())
        for _ in range(STEPS):
            run.train_step(batches, recorder)
        with run.parallel.whole_model() as model:
            return recorder.rows, {name: value.clone() for name, value in model.state_dict().items()}
    finally:
        torch.set_default_dtype(before)


def averaged_after_replay(world):
    """Gradients of a model whose steps would be CUDA graphs: those of rank r are r + 1, in float64 beside float32."""
    model = sclkern.SCLModel(sclkern.SCLConfig.preset("tiny").replace(vision_layers=0))
    model.text.double()
    config = load_config(None, ["run.cuda_graphs=true"])
    parallel = share_model(model, config, world)
    parallel.begin()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, world.rank + 1.0)
    model.temperature.grad = None
    parallel.finish_gradients()
    return {parameter.grad.mean().item() for parameter in model.parameters() if parameter.grad is not None}


def work(rank, size, folder):
    world = World(Place(rank, size, rank))
    averaged, results = averaged_after_replay(world), []
    for case in CASES_OF[size]:
        results.append(train(case, configuration(case, size, case.global_batch(size), folder.parent), world))
    return (results, averaged) if world.main else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equality")
    small_data(folder, PAIRS)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """(case, global batch) -> what one process trains in its place; each is trained once."""
    trained = {}

    def result(case, rows):
        key = case.alone(), rows
        if key not in trained:
            trained[key] = train(case.alone(), configuration(case.alone(), 1, rows, folder), World())
        return trained[key]

    return result


def assert_same(case, rows, found, alone):
    (values, weights), (expected_values, expected_weights) = found, alone(case, rows)
    assert len(values) == len(expected_values) == STEPS
    for step, (of_step, expected) in enumerate(zip(values, expected_values, strict=True)):
        tolerance = 1e-9 if case.dtype == "float64" else 1e-5 if step == 0 else 1e-4
        for name, value in expected.items():
            # Metrics are float32 in every case.
            limit = max(tolerance, 1e-6) if "accuracy" in name else tolerance
            assert of_step[name] == pytest.approx(value, rel=limit, abs=limit), (case, step, name)
    tolerance = 1e-9 if case.dtype == "float64" else 1e-4
    for name, weight in expected_weights.items():
        difference = (weights[name] - weight).abs().max()
        assert difference <= tolerance * max(1, weight.abs().max()), (case, name, difference)


def test_one_process_that_accumulates(alone, folder):
    for case in CASES_OF[2]:
        if case.contrastive and case.accumulation > 1:
            assert_same(case, 12, train(case, configuration(case, 1, 12, folder), World()), alone)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_many_processes(world, alone, folder):
    of_world = folder / str(world)
    of_world.mkdir()
    (results, averaged), *_ = run_ranks(__file__, world, of_world, seconds=300)
    assert averaged == {(world + 1) / 2}
    for case, found in zip(CASES_OF[world], results, strict=True):
        assert_same(case, case.global_batch(world), found, alone)


if __name__ == "__main__":
    be_rank(work)
