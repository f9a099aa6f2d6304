"""Check a case against float64, then measure it; both in one process, on the same inputs."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from registry import ENTRIES, Case, call
from sclkern import reference
from sclkern.tools.bench.workload import WORKLOAD, Size
from ways import UnableError, Way

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SEED = 11
# Three times the second-level cache of an H200: no buffer is still there when its turn comes again.
ROTATED_BYTES = 3 * 60e6
# The definition holds some ten N x N matrices in float64: beyond this, a loss is checked with fewer rows.
CHECKED_ROWS = 16384


class WrongResultError(AssertionError):
    """A way of computing an op is further from float64 than rounding explains: it is not timed."""


def make_inputs(op: str, size: Size, dtype: torch.dtype) -> dict:
    torch.manual_seed(SEED)
    entry = ENTRIES[op]
    inputs = entry.inputs(size.values, dtype, DEVICE)
    return {k: v.requires_grad_() if k in entry.leaves else v for k, v in inputs.items()}


def bytes_of(inputs: dict) -> int:
    return sum(tensor.nbytes for tensor in inputs.values() if isinstance(tensor, Tensor))


def outputs(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def evaluate(run: Callable, inputs: dict, leaves: list[str], dropout_p: float, backward: bool) -> dict[str, Tensor]:
    """Output and gradients by name; the gradient of the output is the same for every way."""
    seed = torch.tensor([SEED], device=DEVICE) if dropout_p else None
    found = outputs(run(inputs, dropout_p, seed))
    if not leaves or not backward:
        return {f"out {i}": tensor.detach() for i, tensor in enumerate(found)}
    out = found[0]
    tensors = [inputs[name] for name in leaves]
    gradients = torch.autograd.grad(out, tensors, output_gradient(out))
    return {"out": out.detach(), **dict(zip((f"gradient of {n}" for n in leaves), gradients, strict=True))}


def output_gradient(out: Tensor) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    return torch.randn(out.shape, generator=generator, device=DEVICE, dtype=torch.float32).to(out.dtype)


@functools.lru_cache(maxsize=4)
def _exact(op: str, size: Size, dtype: torch.dtype, dropout_p: float, without: tuple[str, ...]) -> tuple[dict, dict]:
    """Truth, of the definition in float64, and the largest and root mean square errors of the definition in dtype."""
    inputs = make_inputs(op, size, dtype)
    inputs = {k: None if k in without else v for k, v in inputs.items()}
    leaves = [name for name in ENTRIES[op].leaves if name not in without]
    eager = evaluate(call(reference, op), inputs, leaves, dropout_p, True)
    wide = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    wide = {k: v.requires_grad_() if k in leaves else v for k, v in wide.items()}
    # The dtype's own rounding of the output's gradient is part of the question, not of the answer.
    truth = evaluate(_rounding_gradient(call(reference, op), dtype), wide, leaves, dropout_p, True)
    return truth, {name: errors(eager[name], truth[name]) for name in truth}


def _rounding_gradient(run: Callable, dtype: torch.dtype) -> Callable:
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx, gradient):
            return gradient.to(dtype).to(gradient.dtype)

    def rounded(inputs: dict, dropout_p: float, seed: Tensor | None):
        result = run(inputs, dropout_p, seed)
        return Round.apply(result) if isinstance(result, Tensor) and result.requires_grad else result

    return rounded


def errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest and root mean square error, in units of the largest true value. Whole numbers must be equal."""
    if not truth.is_floating_point():
        return (0.0, 0.0) if torch.equal(result, truth) else (math.inf, math.inf)
    if result.shape != truth.shape:
        return math.inf, math.inf
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    difference = (result.double() - truth).abs() / scale
    return difference.max().item(), difference.square().mean().sqrt().item()


def verify(case: Case) -> dict:
    """Compare with float64, where the definition's own error in the same dtype is the measure.

    Root mean square: at most 1.5 times the definition's and a quarter of the dtype's rounding step, a whole step of a
    single number, which is no mean. Largest: at most four times the definition's and four steps, which one wrong row
    exceeds. Both times the slack of the way.

    Returns:
        The largest root mean square error, and that of the definition beside it.

    Raises:
        WrongResultError: further off, or not finite.
    """
    size = case.size
    if size.values.get("N", 0) > CHECKED_ROWS:
        size = Size(str(CHECKED_ROWS), {**size.values, "N": CHECKED_ROWS}, size.importance, size.dropout_p)
    return _verify(case.op, size, case.dtype, case.way)


@functools.lru_cache(maxsize=16)
def _verify(op: str, size: Size, dtype: torch.dtype, way: Way) -> dict:
    leaves = [name for name in ENTRIES[op].leaves if name not in way.without]
    run = prepared(op, size, dtype, way, False)
    step = torch.finfo(dtype).eps
    worst, of_eager = 0.0, 0.0
    for dropout_p in {0.0, size.dropout_p if way.seeded else 0.0}:
        truth, definition = _exact(op, size, dtype, dropout_p, way.without)
        inputs = {k: v for k, v in make_inputs(op, size, dtype).items() if k not in way.without}
        result = evaluate(run, inputs, leaves, dropout_p, way.backward)
        for name, value in result.items():
            name = "out" if name == "out 0" and name not in truth else name
            largest, square = errors(value, truth[name])
            eager_largest, eager_square = definition[name]
            rounding = step if value.numel() == 1 else step / 4
            bounds = way.slack * (4 * eager_largest + 4 * step), way.slack * (1.5 * eager_square + rounding)
            if not (largest <= bounds[0] and square <= bounds[1]):
                raise WrongResultError(
                    f"{op} {size.name} by {way.name}: {name} is off by {largest:.2e} at most and {square:.2e} in root "
                    f"mean square, allowed {bounds[0]:.2e} and {bounds[1]:.2e}; not timed"
                )
            if square >= worst:
                worst, of_eager = square, eager_square
    return {"error": worst, "eager_error": of_eager, "checked_at": size.name}


@functools.lru_cache(maxsize=2)
def prepared(op: str, size: Size, dtype: torch.dtype, way: Way, kept: bool) -> Callable:
    """The way's function, compiled if it is to be; ``kept``: its backward will run more than once."""
    if not way.compiled:
        return way.run
    torch.compiler.reset()
    compiled = torch.compile(way.run, dynamic=False)

    def run(inputs: dict, dropout_p: float, seed: Tensor | None):
        with torch._functorch.config.patch(donated_buffer=not kept):
            return compiled(inputs, dropout_p, None)

    return run


def make_call(case: Case) -> tuple[Callable[[], object], int]:
    """What is timed, on inputs of its own, and their bytes; a backward alone has its forward behind it."""
    size, way = case.size, case.way
    inputs = make_inputs(case.op, size, case.dtype)
    inputs = {k: v for k, v in inputs.items() if k not in way.without}
    run = prepared(case.op, size, case.dtype, way, case.part == "backward")
    dropout_p = size.dropout_p if way.dropout else 0.0
    # The eager definition counts its mask from a seed slowly: like a user's it draws from torch's generator.
    seed = torch.tensor([SEED], device=DEVICE) if dropout_p and GPU and way.name == "sclkern" else None
    forward = functools.partial(run, inputs, dropout_p, seed)
    if case.part == "forward":
        return forward, bytes_of(inputs)
    leaves = [inputs[name] for name in ENTRIES[case.op].leaves if name in inputs]
    if case.part == "backward":
        out = forward()
        backward = functools.partial(torch.autograd.grad, out, leaves, output_gradient(out), retain_graph=True)
        return backward, bytes_of(inputs)
    gradient = output_gradient(forward())
    return lambda: torch.autograd.grad(forward(), leaves, gradient), bytes_of(inputs)


def quartiles(times: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3


def rounds_of(run: Callable[[], object], seconds: float) -> tuple[int, int]:
    """Rounds and calls in each, so that they take about this long; warms up."""
    run()
    begin = time.perf_counter()
    run()
    once = time.perf_counter() - begin
    iterations = max(1, int(2e-3 / once))
    # Three at least where one takes long.
    return min(50, max(5 if once < 0.2 else 3, int(seconds / (once * iterations)))), iterations


def on_device(case: Case) -> dict:
    """Device time by CUDA events, over the replay of a CUDA graph where it can be captured; memory; launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Autograd runs a backward on the stream of its forward: both have to be the one that is captured.
    with torch.cuda.stream(stream):
        first, size = make_call(case)
        first()
        stream.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = first()
        stream.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
        del result
        launches = _launches(first)
        free = torch.cuda.mem_get_info()[0] / max(peak + size, 1)
        copies = max(1, min(math.ceil(ROTATED_BYTES / max(size, 1)), 32, int(free / 2)))
        calls = [first, *(make_call(case)[0] for _ in range(copies - 1))]
        for run in calls:
            run()
    torch.cuda.synchronize()
    graph, captured = torch.cuda.CUDAGraph(), True
    try:
        with torch.cuda.graph(graph, stream=stream):
            for run in calls:
                run()
    except RuntimeError:
        captured = False
    times = []
    with torch.cuda.stream(stream):
        for _ in range(22):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            if captured:
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
        "captured": captured,
        "rotated_copies": copies,
        "peak_bytes": peak,
        "launches": launches,
    }


def _launches(run: Callable[[], object]) -> int:
    """Kernels and copies that one call puts on the device."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def reason_to_skip(case: Case) -> str | None:
    """Why this case is not measured here, as far as it is known beforehand."""
    way = case.way
    if case.dtype not in way.dtypes and (GPU or not way.package):
        return f"{way.name}: no {str(case.dtype).removeprefix('torch.')}"
    if way.package and not GPU:
        try:
            # Far enough to import the library and see its interface.
            way.run(make_inputs(case.op, case.size, torch.float32), 0.0, None)
        except UnableError as error:
            return str(error)
        except Exception as error:
            return f"{way.package}: installed, but does not run on a CPU ({type(error).__name__})"
        return f"{way.package}: runs on a CPU only for the sake of its interface, not timed"
    if case.part != "forward" and not way.backward:
        return f"{way.name}: forward only"
    return None


def floors(case: Case) -> dict:
    cost = WORKLOAD[case.op].cost(case.size.values, torch.finfo(case.dtype).bits // 8)
    moved, flops = cost.of(case.part)
    return {"bytes": moved, "flops": flops}
