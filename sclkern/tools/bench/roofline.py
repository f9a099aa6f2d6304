"""The roofline: what a machine can do at best, and the time below which an op cannot be on it."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sclkern.tools.bench.figures import three_digits
from sclkern.tools.specs import PASSES, SPECS, Cost


class MachineSpec(NamedTuple):
    """The rates of a machine in one dtype.

    Attributes:
        bandwidth: bytes per second of a copy, read and written bytes together.
        matrix: FLOPs per second of matrix products.
    """

    bandwidth: float
    matrix: float

    @classmethod
    def measured(cls, rates: dict[str, Any], dtype: str) -> MachineSpec:
        """The rates of ``measure`` in a dtype such as "bfloat16"; a matrix rate not measured there bounds nothing."""
        return cls(rates["copy_bytes_per_second"], rates["matrix_flops_per_second"].get(dtype, float("inf")))


# Bfloat16, at a copy and at large matrix products of random numbers.
H200 = MachineSpec(4.3e12, 790e12)


def lower_bound(cost: Cost, pass_: str, machine: MachineSpec) -> float:
    """The time below which an op cannot be from cold memory.

    Args:
        cost: bytes and FLOPs of the op.
        pass_: "forward", "backward" or "both"; forward and backward each have a bound of their own.
        machine: rates of the machine.

    Returns:
        Seconds.
    """
    if pass_ == "both":
        return lower_bound(cost, "forward", machine) + lower_bound(cost, "backward", machine)
    moved, flops = cost.of(pass_)
    return max(moved / machine.bandwidth, flops / machine.matrix)


def measure(copy_bytes: int | None = None, matrix: int | None = None) -> dict[str, Any]:
    """Measure this machine, its GPU where it has one.

    Args:
        copy_bytes: size of the copied buffer; default 4 GiB on a GPU, 256 MiB on a CPU.
        matrix: side of the square matrices; default 8192 on a GPU, 1536 on a CPU. Their numbers are random: zeros would
            draw less power and run faster.

    Returns:
        "copy_bytes_per_second", read and written bytes together, and "matrix_flops_per_second" by dtype: bfloat16,
        float16 and float32 (without TF32) on a GPU, float32 on a CPU. Medians of several runs.
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
    # The first run touches the memory and builds what the library keeps.
    return statistics.median(times[1:])


def planned_table() -> str:
    """Markdown: the lower bounds of every op at the GPU sizes on an H200, from formulas; none is a measurement."""
    lines = [
        f"Planned, not measured: least times on an H200 in bfloat16 at {H200.bandwidth / 1e12:.1f} TB/s and "
        f"{H200.matrix / 1e12:.0f} TFLOP/s, from the bytes and FLOPs of sclkern/tools/specs.",
        "",
        "| op | size | MB forward | GFLOP forward | forward µs | backward µs | both µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, spec in SPECS.items():
        for size in spec.sizes:
            cost = spec.cost(size.values, 2)
            least = [lower_bound(cost, pass_, H200) * 1e6 for pass_ in spec.passes]
            numbers = [three_digits(n) for n in (cost.forward_bytes / 1e6, cost.forward_flops / 1e9, *least)]
            numbers += [""] * (2 + len(PASSES) - len(numbers))
            lines.append(f"| {op} | {size.name} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def format_rates(rates: dict[str, Any]) -> str:
    """The rates of ``measure``, a line each."""
    lines = [f"copy: {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, read and written"]
    lines += [f"matrix, {dtype}: {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates["matrix_flops_per_second"].items()]
    return "\n".join(lines)
