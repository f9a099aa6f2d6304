"""The measurement of a verified case."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness.implementations import UnsupportedError
from benchmarks.harness.op_cases import Case
from benchmarks.harness.verification import DEVICE, GPU, SEED, leaves, make_inputs, output_gradient, prepare
from sclkern.step.cuda_graph import capture
from sclkern.tools.specs import SPECS, Cost

# Three times the second-level cache of an H200: no buffer is still there when its turn comes again.
ROTATED_BYTES = 3 * 60e6


class DeviceLostError(Exception):
    """This process can time nothing more."""


def make_call(case: Case) -> tuple[Callable[[], object], int]:
    """What is timed, on inputs of its own.

    Args:
        case: op, size, dtype, implementation and pass.

    Returns:
        A function to call repeatedly (for a backward alone, its forward has run), and the bytes of its inputs.
    """
    size, implementation = case.size, case.implementation
    inputs = make_inputs(case.op, size, case.dtype, implementation.without)
    input_bytes = sum(tensor.nbytes for tensor in inputs.values() if isinstance(tensor, Tensor))
    run = prepare(case.op, size, case.dtype, implementation, case.pass_ == "backward")
    dropout_p = size.dropout_p if implementation.dropout else 0.0
    # The eager definition derives its mask from a seed slowly; like a user's code it draws from torch's generator.
    seeded = dropout_p and GPU and implementation.name == "sclkern"
    forward = functools.partial(run, inputs, dropout_p, torch.tensor([SEED], device=DEVICE) if seeded else None)
    if case.pass_ == "forward":
        return forward, input_bytes
    tensors = [inputs[name] for name in leaves(inputs)]
    if case.pass_ == "backward":
        out = forward()
        backward = functools.partial(torch.autograd.grad, out, tensors, output_gradient(out), retain_graph=True)
        return backward, input_bytes
    gradient = output_gradient(forward())
    return lambda: torch.autograd.grad(forward(), tensors, gradient), input_bytes


def quartiles(times: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3


def rounds_of(run: Callable[[], object], seconds: float) -> tuple[int, int]:
    """Rounds, and calls in a round, that take about ``seconds``; warms up."""
    run()
    begin = time.perf_counter()
    run()
    once = time.perf_counter() - begin
    iterations = max(1, int(2e-3 / once))
    # Slow cases get three rounds at least.
    return min(50, max(5 if once < 0.2 else 3, int(seconds / (once * iterations)))), iterations


def on_device(case: Case) -> dict:
    """Measure on the GPU: CUDA events around the replay of a CUDA graph, plain launches where none can be captured.

    Args:
        case: op, size, dtype, implementation and pass.

    Returns:
        "device_quartiles" in seconds of a call, "captured", if not "capture_problem", "rotated_copies" of the inputs,
        "peak_bytes" beside the inputs and "launches" of a call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Autograd runs a backward on the stream of its forward: both must be on the stream that is captured.
    with torch.cuda.stream(stream):
        first, input_bytes = make_call(case)
        first()
        stream.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = first()
        stream.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
        del result
        launches = _launches(first)
        fitting = torch.cuda.mem_get_info()[0] / max(peak + input_bytes, 1)
        copies = max(1, min(math.ceil(ROTATED_BYTES / max(input_bytes, 1)), 32, int(fitting / 2)))
        calls = [first, *(make_call(case)[0] for _ in range(copies - 1))]
        for run in calls:
            run()
    torch.cuda.synchronize()
    problem = f"{case.implementation.name} reads values back" if case.implementation.reads_back else None
    graph, problem = (None, problem) if problem else captured(calls, stream)
    times = []
    with torch.cuda.stream(stream):
        for _ in range(22):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            if graph is not None:
                graph.replay()
            else:
                for run in calls:
                    run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / copies)
    torch.cuda.synchronize()
    # The first two warm up the clocks and the replay.
    return {
        "device_quartiles": quartiles(times[2:]),
        "captured": graph is not None,
        "rotated_copies": copies,
        "peak_bytes": peak,
        "launches": launches,
        **({"capture_problem": problem} if problem else {}),
    }


def captured(
    calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
    """Capture calls that have run before.

    What waits for the device is found beforehand, because a capture that fails leaves a process in doubt.

    Args:
        calls: in their order.
        stream: on which they ran.

    Returns:
        The graph, or None and why there is none.

    Raises:
        DeviceLostError: after a failed capture nothing runs any more.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            for run in calls:
                run()
    except RuntimeError as error:
        return None, f"waits for the device: {_first_line(error)}"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with capture(graph, stream=stream):
            for run in calls:
                run()
    except RuntimeError as error:
        _require_device(error)
        return None, f"cannot be captured: {_first_line(error)}"
    return graph, None


def _require_device(cause: Exception) -> None:
    """Raise unless this process still allocates, draws and computes on its device."""
    try:
        torch.rand(64, 64, device="cuda").matmul(torch.rand(64, 64, device="cuda")).sum().item()
    except RuntimeError as error:
        raise DeviceLostError(f"after a failed capture ({_first_line(cause)}): {_first_line(error)}") from cause


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def _launches(run: Callable[[], object]) -> int:
    """Kernels and copies that one call puts on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def reason_to_skip(case: Case) -> str | None:
    """Why this case is not measured on this machine, as far as it can be known beforehand."""
    implementation = case.implementation
    package = implementation.package
    if case.dtype not in implementation.dtypes and (GPU or not package):
        return f"{implementation.name}: no {str(case.dtype).removeprefix('torch.')}"
    if package and not GPU:
        try:
            # Far enough to import the library and see its interface.
            implementation.run(make_inputs(case.op, case.size, torch.float32), 0.0, None)
        except UnsupportedError as error:
            return str(error)
        except Exception as error:
            return f"{package}: installed, but does not run on a CPU ({type(error).__name__})"
        return f"{package}: runs on a CPU, but is timed on a GPU only"
    if case.pass_ != "forward" and not implementation.backward:
        return f"{implementation.name}: forward only"
    return None


def cost_of(case: Case) -> Cost:
    """The least bytes and FLOPs of a case's op."""
    return SPECS[case.op].cost(case.size.values, torch.finfo(case.dtype).bits // 8)
