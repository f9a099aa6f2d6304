"""The whole training step, forward and backward: the planned step beside separate padded passes, each as one would run
it.

A case is timed only after its losses and gradients, without dropout, agreed with those of separate passes by eager ops
in float32 in the same process. Captions have the lengths of COCO's; separate passes pad them to ``max_text_len``, as
the published code does.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass, replace

import pytest
import torch

import tracing
from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.profiling import phase
from sclkern.step import CapturedStep, SCLLosses, StepConfig, draw_masks, run_step
from sclkern.step.flops import describe_plan
from sclkern.tools.bench.workload import captions

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PLANNED, SEPARATE = StepConfig(), StepConfig.reference()


@dataclass(frozen=True)
class Way:
    """How a step is executed; ``negatives`` are the false pictures of ITM, ``captured`` is by CUDA graph."""

    step: StepConfig = PLANNED
    negatives: str = "dataset"
    backend: str = "auto"
    compiled: bool = False
    captured: bool = False


WAYS = {
    "separate/eager": Way(SEPARATE, backend="eager"),
    "separate/sdpa": Way(SEPARATE, backend="sdpa"),
    "separate/sdpa/compiled": Way(SEPARATE, backend="sdpa", compiled=True),
    "planned/eager": Way(backend="eager"),
    "planned": Way(),
    "planned/graph": Way(captured=True),
    "planned/no absorption": Way(StepConfig(absorb="never")),
    "planned/in_batch": Way(negatives="in_batch"),
}
# On a CPU "auto" of the planned step and "eager" of separate passes are the two that a user would compare.
ON_CPU = ("separate/eager", "separate/sdpa", "planned", "planned/no absorption", "planned/in_batch")
ON_GPU = sorted(((rows, name) for rows in (64, 16, 128) for name in WAYS), key=lambda case: WAYS[case[1]].compiled)
# What compiles for minutes comes last.
CASES = ON_GPU if GPU else [(2, name) for name in ON_CPU]


def build(rows: int) -> tuple[SCLModel, dict, int, int]:
    """Model, batch padded to ``max_text_len``, tokens of the longest caption and of all."""
    torch.manual_seed(0)
    config = SCLConfig.preset("base")
    model = SCLModel(config, ObjectiveConfig(itm_negatives="dataset")).to(DEVICE)
    lengths = torch.tensor(captions(rows), device=DEVICE)
    column = torch.arange(config.max_text_len, device=DEVICE)
    ids = torch.randint(5, config.vocab_size - 1, (rows, config.max_text_len), device=DEVICE)
    mask = column < lengths[:, None]
    ids = torch.where(column == 0, config.bos_id, ids)
    ids = torch.where(column == lengths[:, None] - 1, config.eos_id, ids).masked_fill(~mask, config.pad_id)
    image, false = torch.randn(2, rows, 3, config.image_size, config.image_size, device=DEVICE)
    batch = {"image": image, "false_image": false, "text_ids": ids, "text_mask": mask}
    return model, batch, int(lengths.max()), int(lengths.sum())


def prepared(model: SCLModel, batch: dict, longest: int, tokens: int, name: str) -> dict:
    """Set the model up for a way of execution; returns the batch as its loader would give it."""
    way = WAYS[name]
    model.step = way.step
    model.objectives = replace(model.objectives, itm_negatives=way.negatives)
    model.set_backend(way.backend)
    if not way.step.pack:
        return batch
    packed = {key: value[:, :longest] if key.startswith("text") else value for key, value in batch.items()}
    return {**packed, "text_tokens": tokens}


def losses_and_gradients(rows: int, name: str, negatives: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Total and gradients of two pairs without dropout, in float32."""
    model, batch, longest, _ = build(rows)
    model.eval()
    small = {key: value[:2] for key, value in batch.items()}
    given = prepared(model, small, longest, int(small["text_mask"].sum()), name)
    model.objectives = replace(model.objectives, itm_negatives=negatives)
    losses = make_step(model, given, WAYS[name], None, seed=0)()
    return losses.total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@functools.cache
def truth(rows: int, negatives: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of separate eager passes."""
    return losses_and_gradients(rows, "separate/eager", negatives)


def check(rows: int, name: str) -> None:
    """Losses and the gradient of every parameter against separate eager passes."""
    if name == "separate/eager":
        return
    negatives = WAYS[name].negatives
    (loss, gradients), (other, others) = truth(rows, negatives), losses_and_gradients(rows, name, negatives)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    for n, gradient in gradients.items():
        # A key's bias has no gradient but rounding.
        difference = (others[n] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert difference < 1e-4, (n, difference)


def make_step(model: SCLModel, batch: dict, way: Way, precision: torch.dtype | None, seed: int = 1):
    """What takes a step and returns its losses; gradients are added to those that there are."""
    if way.captured:
        captured = CapturedStep(model, precision=precision)
        return lambda: captured(batch, seed)
    forward = torch.compile(run_step) if way.compiled else run_step

    def step() -> SCLLosses:
        with torch.autocast(DEVICE, precision, enabled=precision is not None):
            losses = forward(model, batch, draw_masks(model, batch, seed))
        with phase("backward"):
            losses.total.backward()
        return losses

    return step


@pytest.mark.parametrize(("rows", "name"), CASES)
def test_step(benchmark, record, rows, name):
    check(rows, name)
    model, batch, longest, tokens = build(rows)
    batch = prepared(model, batch, longest, tokens, name)
    step = make_step(model, batch, WAYS[name], torch.bfloat16 if GPU else None)

    def timed() -> None:
        step()
        model.zero_grad(set_to_none=True)
        if GPU:
            torch.cuda.synchronize()

    # On a CPU the check has warmed everything up, and a step takes seconds.
    benchmark.pedantic(timed, rounds=7 if GPU else 3, warmup_rounds=2 if GPU else 0)
    times = benchmark.stats.stats.data
    described = describe_plan(model.config, model.objectives, model.step)
    record(
        f"step/base/{name}",
        rows=rows,
        dtype="bfloat16" if GPU else "float32",
        captions=tokens,
        median_seconds=statistics.median(times),
        seconds=sorted(times),
        pairs_per_second=rows / statistics.median(times),
        flops_a_pair=described["flops"],
        flops_ratio=described["flops_ratio"],
        **observed(step, model),
    )


def observed(step, model: SCLModel) -> dict:
    """Of one more step, beside gradients that are there: ``phases``, the share of each in its time, and
    ``activation_bytes``, what it had allocated at its peak. On a CPU a step takes long: one step for both."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if GPU:
        step()
        # Of a graph, this is what it had beside its own pool: next to nothing.
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - held
        found = tracing.trace(step)
        counts = {**tracing.device_counts(found), "host_seconds": host_seconds(step)}
        return {"phases": tracing.shares(found), "activation_bytes": peak, **counts}
    found = tracing.trace(step)
    return {"phases": tracing.shares(found), "activation_bytes": tracing.peak_bytes(found)}


def host_seconds(step) -> float:
    """Until Python has launched a step on a GPU that is idle: near the step's own time, the step is bound by it."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times)
