"""The memory estimate of a step, against what a CPU holds and against whole steps of training on fake CUDA tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness.profiler_trace import peak_bytes, record_trace
from sclkern import ObjectiveConfig, SCLConfig, SCLModel, UserError
from sclkern.ops.dispatch import interpreted
from sclkern.step import StepConfig
from sclkern.step.allocations import Allocations
from sclkern.step.fake_cuda import FREES_NODES, autocast, backward
from sclkern.step.memory import MemoryEstimate, estimate_memory, parameter_bytes

pytestmark = [
    pytest.mark.skipif(interpreted(), reason="in the interpreter the ops choose their paths otherwise"),
    pytest.mark.skipif(not FREES_NODES, reason="this torch cannot free a node of a graph, so that too much seems held"),
]

SMALL = SCLConfig(
    width=128, vision_layers=4, text_layers=3, fusion_layers=2, image_size=64, patch_size=16, vocab_size=2000,
    max_text_len=24, text_positions=30, projection_dim=64, mask_id=1999,
)  # fmt: skip
TINY = SCLConfig.preset("tiny")
DATASET = ObjectiveConfig(itm_negatives="dataset")
LENGTH = 12


def training(config, step, rows, accumulation, backend="auto", run=None):
    """A model and a function that takes a step of training with AdamW; ``run`` does forward and backward."""
    model = SCLModel(config, DATASET, step).train().set_backend(backend)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    image = torch.ones(rows, 3, config.image_size, config.image_size)
    ids = torch.full((rows, LENGTH), 5)
    place = torch.arange(rows)
    batch = {"image": image, "text_ids": ids, "text_mask": ids > 0, "text_tokens": rows * LENGTH, "place": place}
    batch |= {"match_labels": place % 2, "false_image": image[::2].clone()}

    def take():
        optimizer.zero_grad()
        for micro in range(accumulation):
            (run or (lambda model, batch, seed: model(batch, seed=seed).total.backward()))(model, batch, micro)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return model, optimizer, batch, take


@pytest.mark.parametrize(
    ("config", "rows", "checkpoint", "accumulation"),
    [(TINY, 16, False, 1), (TINY, 16, True, 1), (SMALL, 8, False, 2), (SMALL, 2, False, 1)],
)
def test_the_eager_path_holds_what_a_cpu_measures(config, rows, checkpoint, accumulation):
    step = StepConfig(checkpoint_blocks=checkpoint)
    model, optimizer, batch, take = training(config, step, rows, accumulation, "eager")
    take()
    optimizer.zero_grad()
    held = 3 * sum(parameter.nbytes for parameter in model.parameters())
    held += sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    measured = held + peak_bytes(record_trace(take))
    sizes = {"rows": rows, "caption_tokens": LENGTH, "padded_tokens": LENGTH, "accumulation": accumulation}
    estimate = estimate_memory(config, DATASET, step, **sizes, backend="eager")
    assert abs(estimate.total / measured - 1) < 0.15, (estimate, measured)


@pytest.mark.parametrize(
    ("config", "rows", "checkpoint", "accumulation", "precision"),
    [(TINY, 16, False, 1, "bfloat16"), (TINY, 32, True, 2, "bfloat16"), (SMALL, 2, False, 1, "float32")],
)
def test_the_kernel_path_holds_what_a_tracker_sees(config, rows, checkpoint, accumulation, precision):
    pytest.importorskip("triton")
    step = StepConfig(checkpoint_blocks=checkpoint)
    dtype = torch.bfloat16 if precision == "bfloat16" else None

    def run(model, batch, seed):
        with autocast(dtype):
            losses = model(batch, seed=seed)
        total = losses.total
        del losses
        before = {p: p.grad for p in model.parameters() if p.grad is not None}
        for parameter, gradient in backward(total, before or None).items():
            parameter.grad = gradient

    with FakeTensorMode(), torch.device("cuda"), Allocations() as tracker:
        _, _, _, take = training(config, step, rows, accumulation, run=run)
        take()
        begin = len(tracker.made)
        take()
    tracker.made = [one for one in tracker.made[:begin] if one.stop is None or one.stop > tracker.made[begin].start] + (
        tracker.made[begin:]
    )
    tracked = tracker.peak()[0]
    sizes = {"rows": rows, "caption_tokens": LENGTH, "padded_tokens": LENGTH, "accumulation": accumulation}
    estimate = estimate_memory(config, DATASET, step, **sizes, precision=precision)
    assert abs(estimate.total / tracked - 1) < 0.15, (estimate, tracked)


def test_allocations_are_recorded_with_their_peak():
    with FakeTensorMode(), torch.device("cuda"), Allocations() as allocations:
        x = torch.empty(10, 10)  # 400
        allocations.section = "later"
        y = (x + 1) * 2  # 400 for the sum, freed, 400
        view = y[:2]
        del y
        z = torch.empty(50)  # 200
    peak, held = allocations.peak()
    assert peak == 1200
    assert [(one.bytes, one.section) for one in held] == [(400, ""), (400, "later"), (400, "later")]
    assert view.shape == (2, 10) and len(z) == 50


def test_a_backward_frees_what_it_has_used_as_the_engine_does():
    with FakeTensorMode(), torch.device("cuda"), Allocations() as allocations:
        weights = [torch.empty(64, 64, requires_grad=True) for _ in range(8)]
        x = torch.empty(1000, 64)
        for weight in weights:
            x = (x @ weight).relu()
        loss = x.sum()
        del x
        begin = allocations.peak()[0]
        found = backward(loss)
    assert len(found) == 8
    layer = 1000 * 64 * 4
    # The activations of a layer are gone before the gradients of the next.
    assert allocations.peak()[0] < begin + 3 * layer


def test_shards_and_cached_features_are_counted():
    sizes = {"rows": 4, "caption_tokens": LENGTH, "padded_tokens": LENGTH}
    one = estimate_memory(TINY, DATASET, StepConfig(), **sizes)
    four = estimate_memory(TINY, DATASET, StepConfig(), **sizes, world_size=4, parallel="fsdp")
    block, rest, _ = parameter_bytes(TINY)
    assert four.weights == one.weights / 4 and four.moments == one.moments / 4
    assert four.communication == 3 * block + 2 * rest
    ddp = estimate_memory(TINY, DATASET, StepConfig(), **sizes, world_size=4)
    assert ddp.gradients == ddp.weights
    cached = estimate_memory(TINY, DATASET, StepConfig(), **sizes, accumulation=8, contrastive_batch=32)
    # Of ITC two projections of 32, of MVSC and MLSC two CLS of 64 each; with gradients, in float32.
    assert cached.contrast == 32 * (2 * 32 + 4 * 64) * 8
    # Those of the other micro-batches wait on the host.
    assert cached.batch == one.batch
    with pytest.raises(UserError, match="world_size: got 0, expected 1 or more"):
        estimate_memory(TINY, DATASET, StepConfig(), rows=4, world_size=0)


def test_an_estimate_is_one_line():
    estimate = MemoryEstimate(1e9, 1e9, 2e9, 0, 5e9, 0, 0)
    parts = "activations 5.00, moments 2.00, weights 1.00, gradients 1.00"
    assert estimate.line() == f"memory at the peak of a step, estimated: 9.00 GB ({parts})"
