"""On a CPU: how much faster the planned step is than separate passes by torch's attention, beside what FLOPs allow.

Both take the same negatives and take turns, in the processor's time of one thread, so that the speed of the machine and
its other users fall out of the ratio.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.cases.test_step import DEVICE, GPU, VARIANTS, build, check, make_step, prepared
from sclkern.step.flops import describe_plan

ROWS, ROUNDS = 2, 3
SIDES = ("separate/sdpa", "planned")

pytestmark = pytest.mark.skipif(GPU, reason="on a GPU the cases of test_step.py have records of their own")


@pytest.mark.parametrize("negatives", ["dataset", "in_batch"])
def test_step_ratio(record, negatives):
    for name in SIDES:
        check(ROWS, name, negatives)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = take_turns(negatives)
    finally:
        torch.set_num_threads(threads)
    model, *_ = build(ROWS)
    objectives = replace(model.objectives, itm_negatives=negatives)
    flops = {
        name: describe_plan(model.config, objectives, VARIANTS[name].step, device=DEVICE)["flops"] for name in SIDES
    }
    separate, planned = (statistics.median(seconds[name]) for name in SIDES)
    allowed = flops["separate/sdpa"] / flops["planned"]
    record(
        f"step_ratio/base/{negatives}",
        rows=ROWS,
        dtype="float32",
        separate_seconds=sorted(seconds["separate/sdpa"]),
        planned_seconds=sorted(seconds["planned"]),
        ratio=separate / planned,
        flops_ratio=allowed,
        quotient=separate / planned / allowed,
    )


def take_turns(negatives: str) -> dict[str, list[float]]:
    """Processor's seconds of training steps by side, after one that warms up."""
    steps = {}
    for name in SIDES:
        model, batch, longest, tokens = build(ROWS)
        given = prepared(model, batch, longest, tokens, name)
        model.objectives = replace(model.objectives, itm_negatives=negatives)
        steps[name] = model, make_step(model, given, VARIANTS[name], None)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(ROUNDS + 1):
        for name, (model, step) in steps.items():
            begin = time.thread_time()
            step()
            model.zero_grad(set_to_none=True)
            if number:
                seconds[name].append(time.thread_time() - begin)
    return seconds
