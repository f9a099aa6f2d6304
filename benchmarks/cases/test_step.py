"""The whole training step, forward and backward: the planned step beside separate padded passes.

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

from benchmarks.harness import profiler_trace
from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.profiling import phase
from sclkern.step import CapturedStep, SCLLosses, StepConfig, draw_masks, run_step
from sclkern.step.flops import describe_plan
from sclkern.tools.specs import captions

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PLANNED, SEPARATE = StepConfig(), StepConfig.published()


@dataclass(frozen=True)
class Variant:
    """How a step runs.

    Attributes:
        step: the step's configuration.
        negatives: where ITM's negative images come from.
        backend: backend of the model.
        compiled: by torch.compile.
        captured: as a CUDA graph.
    """

    step: StepConfig = PLANNED
    negatives: str = "dataset"
    backend: str = "auto"
    compiled: bool = False
    captured: bool = False


VARIANTS = {
    "separate/eager": Variant(SEPARATE, backend="eager"),
    "separate/sdpa": Variant(SEPARATE, backend="sdpa"),
    "separate/sdpa/compiled": Variant(SEPARATE, backend="sdpa", compiled=True),
    "planned/eager": Variant(backend="eager"),
    "planned": Variant(),
    "planned/graph": Variant(captured=True),
    "planned/no absorption": Variant(StepConfig(absorb="never")),
    "planned/in_batch": Variant(negatives="in_batch"),
}
# On a CPU a user would compare "auto" of the planned step with "eager" of separate passes.
ON_CPU = ("separate/eager", "separate/sdpa", "planned", "planned/no absorption", "planned/in_batch")
# Cases that compile for minutes come last.
ON_GPU = [(rows, name) for rows in (64, 16, 128) for name in VARIANTS]
ON_GPU.sort(key=lambda case: VARIANTS[case[1]].compiled)
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
    image, negative = torch.randn(2, rows, 3, config.image_size, config.image_size, device=DEVICE)
    batch = {"image": image, "false_image": negative, "text_ids": ids, "text_mask": mask}
    return model, batch, int(lengths.max()), int(lengths.sum())


def prepared(model: SCLModel, batch: dict, longest: int, tokens: int, name: str) -> dict:
    """Set the model up for a variant; returns the batch as its loader would give it."""
    variant = VARIANTS[name]
    model.step = variant.step
    model.objectives = replace(model.objectives, itm_negatives=variant.negatives)
    model.set_backend(variant.backend)
    if not variant.step.pack:
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
    losses = make_step(model, given, VARIANTS[name], None, seed=0)()
    return losses.total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@functools.cache
def truth(rows: int, negatives: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Total and gradients of separate eager passes."""
    return losses_and_gradients(rows, "separate/eager", negatives)


def check(rows: int, name: str, negatives: str | None = None) -> None:
    """Losses and the gradient of every parameter against separate eager passes, with the negatives of the variant or
    others."""
    if name == "separate/eager":
        return
    negatives = negatives or VARIANTS[name].negatives
    (loss, gradients), (other, others) = truth(rows, negatives), losses_and_gradients(rows, name, negatives)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    for n, gradient in gradients.items():
        # The gradient of a key bias is rounding only.
        difference = (others[n] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert difference < 1e-4, (n, difference)


def make_step(model: SCLModel, batch: dict, variant: Variant, precision: torch.dtype | None, seed: int = 1):
    """A function that takes a step and returns its losses; it adds gradients to those that are there."""
    if variant.captured:
        captured = CapturedStep(model, precision=precision)
        return lambda: captured(batch, seed)
    forward = torch.compile(run_step) if variant.compiled else run_step

    def step() -> SCLLosses:
        with torch.autocast(DEVICE, precision, enabled=precision is not None):
            masks = draw_masks(model.config, model.objectives, batch, seed)
            losses = forward(model, model.objectives, model.step, batch, masks)
        with phase("backward"):
            losses.total.backward()
        return losses

    return step


@pytest.mark.parametrize(("rows", "name"), CASES)
def test_step(benchmark, record, rows, name):
    check(rows, name)
    model, batch, longest, tokens = build(rows)
    batch = prepared(model, batch, longest, tokens, name)
    step = make_step(model, batch, VARIANTS[name], torch.bfloat16 if GPU else None)

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
    """Observe one more step, with gradients allocated: ``phases``, their shares of its time, and ``activation_bytes``,
    its peak of memory. On a CPU a step takes long: one step serves both."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if GPU:
        step()
        # A graph holds its memory in a pool of its own: next to nothing is measured here.
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - held
        trace = profiler_trace.record_trace(step)
        counts = {**profiler_trace.device_counts(trace), "host_seconds": host_seconds(step)}
        return {"phases": profiler_trace.shares(trace), "activation_bytes": peak, **counts}
    trace = profiler_trace.record_trace(step)
    return {"phases": profiler_trace.shares(trace), "activation_bytes": profiler_trace.peak_bytes(trace)}


def host_seconds(step) -> float:
    """Seconds until Python has launched a step on an idle GPU: where they are near the step's time, they bound it."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times)
