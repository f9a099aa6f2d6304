"""What a machine can do at best: bytes per second of a copy, operations per second of matrix products."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from sclkern.tools.bench.report import three_digits
from sclkern.tools.bench.workload import PASSES, PLANNED, WORKLOAD, floor


def measure(copy_bytes: int | None = None, matrix: int | None = None) -> dict:
    """Measure this machine, its GPU where it has one.

    Args:
        copy_bytes: size of the copied buffer; default 4 GiB on a GPU, 256 MiB else.
        matrix: side of the square matrices; default 8192 on a GPU, 1536 else. Their numbers are random: zeros would
            draw less power and run faster.

    Returns:
        "copy_bytes_per_second", read and written bytes together, and "matrix_flops_per_second" by dtype: bfloat16,
        float16 and float32 (without TF32) on a GPU, float32 else. Medians of several runs.
    """
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    copy_bytes = copy_bytes or (2**32 if gpu else 2**28)
    matrix = matrix or (8192 if gpu else 1536)
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(functools.partial(target.copy_, source), gpu)
    rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if gpu else (torch.float32,):
        a, b = torch.randn(2, matrix, matrix, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _seconds(functools.partial(torch.mm, a, b, out=out), gpu)
        rates[str(dtype).removeprefix("torch.")] = 2 * matrix**3 / seconds
    return {"copy_bytes_per_second": copied, "matrix_flops_per_second": rates}


def _seconds(call: Callable[[], object], gpu: bool) -> float:
    times = []
    for _ in range(13 if gpu else 6):
        if gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    # The first touches the memory and builds what the library keeps.
    return statistics.median(times[1:])


def planned_table() -> str:
    """Markdown: the floors of every op at the GPU sizes on an H200, from formulas; nothing of it is measured."""
    lines = [
        f"Planned, not measured: least times on an H200 in bfloat16 at {PLANNED.bandwidth / 1e12:.1f} TB/s and "
        f"{PLANNED.matrix / 1e12:.0f} TFLOP/s, from the bytes and operations of sclkern/tools/bench/workload.py.",
        "",
        "| op | size | MB forward | GFLOP forward | forward µs | backward µs | both µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, work in WORKLOAD.items():
        for size in work.gpu:
            cost = work.cost(size.values, 2)
            least = [floor(cost, part, PLANNED) * 1e6 for part in (PASSES if work.gradient else PASSES[:1])]
            numbers = [three_digits(n) for n in (cost.forward_bytes / 1e6, cost.forward_flops / 1e9, *least)]
            numbers += [""] * (2 + len(PASSES) - len(numbers))
            lines.append(f"| {op} | {size.name} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def format_rates(rates: dict) -> str:
    """Lines for people."""
    lines = [f"copy: {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, read and written"]
    lines += [f"matrix, {dtype}: {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates["matrix_flops_per_second"].items()]
    return "\n".join(lines)
