"""The whole training step, forward and backward: the planned step beside separate padded passes, each as one would run
it.

A case is timed only after its losses and gradients, without dropout, agreed with those of separate passes by eager ops
in float32 in the same process. Captions have the lengths of COCO's; separate passes pad them to ``max_text_len``, as
the published code does.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.step import StepConfig, draw_masks, run_step
from sclkern.step.flops import describe_plan

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Name: execution, false pictures of ITM, backend of the model, whether torch.compile.
SEPARATE = StepConfig.reference()
WAYS = {
    "separate/eager": (SEPARATE, "dataset", "eager", False),
    "separate/sdpa": (SEPARATE, "dataset", "sdpa", False),
    "separate/sdpa/compiled": (SEPARATE, "dataset", "sdpa", True),
    "planned/eager": (StepConfig(), "dataset", "eager", False),
    "planned": (StepConfig(), "dataset", "auto", False),
    "planned/no absorption": (StepConfig(absorb="never"), "dataset", "auto", False),
    "planned/in_batch": (StepConfig(), "in_batch", "auto", False),
}
# On a CPU "auto" of the planned step and "eager" of separate passes are the two that a user would compare.
ON_CPU = ("separate/eager", "separate/sdpa", "planned", "planned/no absorption", "planned/in_batch")
CASES = [(rows, name) for rows in (16, 64, 128) for name in WAYS] if GPU else [(2, name) for name in ON_CPU]
# Tokens of captions with <s> and </s>: 13 on average, as COCO's.
LENGTHS = (12, 13, 12, 14, 11, 15, 13, 16, 12, 13, 18, 12, 11, 14, 13, 10)


def build(rows: int, preset: str = "base", length: int = 50):
    torch.manual_seed(0)
    config = SCLConfig.preset(preset)
    model = SCLModel(config, ObjectiveConfig(itm_negatives="dataset")).to(DEVICE)
    lengths = torch.tensor([LENGTHS[i % len(LENGTHS)] for i in range(rows)], device=DEVICE)
    column = torch.arange(length, device=DEVICE)
    ids = torch.randint(5, config.vocab_size - 1, (rows, length), device=DEVICE)
    mask = column < lengths[:, None]
    ids = torch.where(column == 0, config.bos_id, ids)
    ids = torch.where(column == lengths[:, None] - 1, config.eos_id, ids).masked_fill(~mask, config.pad_id)
    image, false = torch.randn(2, rows, 3, config.image_size, config.image_size, device=DEVICE)
    batch = {"image": image, "false_image": false, "text_ids": ids, "text_mask": mask}
    return model, batch, int(lengths.max()), int(lengths.sum())


def prepared(model: SCLModel, batch: dict, longest: int, tokens: int, name: str) -> dict:
    """Set the model up for a way of execution; returns the batch as its loader would give it."""
    step, negatives, backend, _ = WAYS[name]
    model.step = step
    model.objectives = replace(model.objectives, itm_negatives=negatives)
    model.set_backend(backend)
    if not step.pack:
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
    losses = run_step(model, given, draw_masks(model, given, 0))
    losses.total.backward()
    return losses.total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@functools.cache
def truth(rows: int, negatives: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of separate eager passes."""
    return losses_and_gradients(rows, "separate/eager", negatives)


def check(rows: int, name: str) -> None:
    """Losses and the gradient of every parameter against separate eager passes."""
    negatives = WAYS[name][1]
    (loss, gradients), (other, others) = truth(rows, negatives), losses_and_gradients(rows, name, negatives)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    for n, gradient in gradients.items():
        # A key's bias has no gradient but rounding.
        difference = (others[n] - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert difference < 1e-4, (n, difference)


def make_step(model: SCLModel, batch: dict, compiled: bool = False):
    precision = torch.bfloat16 if GPU else torch.float32
    forward = torch.compile(run_step) if compiled else run_step

    def step() -> None:
        with torch.autocast(DEVICE, precision, enabled=GPU):
            losses = forward(model, batch, draw_masks(model, batch, 1))
        losses.total.backward()
        model.zero_grad(set_to_none=True)
        if GPU:
            torch.cuda.synchronize()

    return step


@pytest.mark.parametrize(("rows", "name"), CASES)
def test_step(benchmark, record, rows, name):
    check(rows, name)
    model, batch, longest, tokens = build(rows)
    batch = prepared(model, batch, longest, tokens, name)
    step = make_step(model, batch, WAYS[name][3])
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if GPU else None
    # On a CPU the check has warmed everything up, and a step takes seconds.
    benchmark.pedantic(step, rounds=7 if GPU else 3, warmup_rounds=2 if GPU else 0)
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
        **memory(rows, name, held),
    )


def memory(rows: int, name: str, held: int | None) -> dict[str, int]:
    """``activation_bytes``: what the step had at its peak above what was there before it."""
    if GPU:
        return {"activation_bytes": torch.cuda.max_memory_allocated() - held}
    # A process of its own costs a step more.
    return {"activation_bytes": activation_bytes(rows, name)} if name in ("separate/eager", "planned") else {}


def activation_bytes(rows: int, name: str) -> int:
    """Peak of a step above parameters and gradients, in a process of its own."""
    command = [sys.executable, __file__, str(rows), name]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def resident_bytes(field: str) -> int:
    """ "VmRSS" now, "VmHWM" at most. Not getrusage: its maximum begins with that of the process which started this."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[field].split()[0])


def main() -> None:
    rows, name = int(sys.argv[1]), sys.argv[2]
    model, batch, longest, tokens = build(rows)
    batch = prepared(model, batch, longest, tokens, name)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # Libraries allocate their buffers in a step of the smallest model.
    small, pairs, *sizes = build(2, "tiny", 16)
    pairs = prepared(small, pairs, *sizes, name)
    run_step(small, pairs, draw_masks(small, pairs, 0)).total.backward()
    held = resident_bytes("VmRSS")
    run_step(model, batch, draw_masks(model, batch, 1)).total.backward()
    print(resident_bytes("VmHWM") - held)


if __name__ == "__main__":
    main()
