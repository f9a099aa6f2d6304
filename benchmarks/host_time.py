"""Host time of every op: what Python takes for a call while nothing is computed, as ratios to torch's own LayerNorm.

    python -m benchmarks.host_time                      every op, forward and both passes, with records
    python -m benchmarks.host_time --op attention --profile
    python -m benchmarks.host_time --step --rounds 10   the planned step, in float32 and under autocast to bfloat16

The ops take the path of their kernels on CPU tensors of a few elements, under a driver of Triton whose launch returns
at once (``harness/idle_driver.py``); Triton's binder is part of the time, the compiler is not. A ratio is that of the
medians of many rounds, in each of which every op and ``layer_norm(x + r)`` take turns, in the processor's time of the
thread, so that the speed of the machine and its other users fall out. A seed taken from those that a step draws, casts,
and products that an op leaves to torch are part of its time.

An op is timed only after its kernels were as right as ``harness/verification.py`` asks, in Triton's interpreter and a
process of its own, on the tensors that are timed. A step is made of these ops and has tests of its own; in its time are
the matrix products of a CPU, at small widths.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import verification
from benchmarks.harness.idle_driver import kernels_on_a_cpu
from benchmarks.harness.idle_step import PRECISIONS, step_calls
from benchmarks.harness.implementations import implementations
from benchmarks.harness.op_cases import Case
from sclkern import ops
from sclkern.errors import UserError
from sclkern.random import one_seed_draw
from sclkern.tools.bench import records
from sclkern.tools.specs import SPECS, Size

BASELINE = "layer_norm(x + r)"
# The dimension that differs from step to step, so that rows begin at multiples of 16 bytes; and dropout.
LENGTH, DROPOUT_P = 8, 0.1
# Calls of one function in a round.
CALLS = 5

Call = Callable[[], object]


def pair(forward: Call, leaves: Sequence[Tensor]) -> dict[str, Call]:
    """The forward of a function, and both its passes.

    Args:
        forward: the call, whose first output has the gradient.
        leaves: what the backward computes gradients of; none for a function without a backward.

    Returns:
        The calls by name of the pass.
    """
    if not leaves:
        return {"forward": forward}
    out: Any = forward()
    grad = torch.ones_like(out[0] if isinstance(out, tuple) else out)

    def both() -> None:
        out: Any = forward()
        torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, grad)

    return {"forward": forward, "both": both}


def calls_of(op: str) -> dict[str, Call]:
    """The passes of an op on a few elements, with dropout where it has it, and no seed given.

    Args:
        op: name of the op.

    Returns:
        The calls by name of the pass.
    """
    torch.manual_seed(0)
    inputs = SPECS[op].small_inputs(LENGTH, "cpu")
    leaves = [inputs[name].requires_grad_() for name in SPECS[op].leaves(inputs)] if SPECS[op].differentiable else []
    function, options = getattr(ops, op), {"dropout_p": DROPOUT_P} if SPECS[op].dropout else {}
    return pair(lambda: function(**inputs, **options), leaves)


def baseline() -> dict[str, Call]:
    """Both passes of torch's LayerNorm of a sum, of the shape that ``dropout_add_layer_norm`` is timed at."""
    inputs = SPECS["dropout_add_layer_norm"].small_inputs(LENGTH, "cpu")
    leaves = [inputs[name].requires_grad_() for name in ("x", "residual", "weight", "bias")]
    x, residual, weight, bias = leaves
    return pair(lambda: F.layer_norm(x + residual, weight.shape, weight, bias), leaves)


def measure(functions: dict[tuple[str, str], Call], rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds of a call of each function, which take turns.

    Args:
        functions: by name.
        rounds: of ``CALLS`` calls of each function.

    Returns:
        Seconds by name.
    """
    times: dict[tuple[str, str], list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(CALLS):
            function()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in functions.items():
                begin = time.thread_time()
                for _ in range(CALLS):
                    function()
                times[name].append((time.thread_time() - begin) / CALLS)
    finally:
        if enabled:
            gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def host_times(names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Measure ops under the idle driver.

    Args:
        names: of the ops.
        rounds: as of ``measure``.

    Returns:
        For each op: "op", seconds of its "forward" and of "both" passes, the ratios "forward_ratio" and "both_ratio" to
        the same passes of the baseline, and the baseline's seconds. Draws have no "both".
    """
    with kernels_on_a_cpu(), one_seed_draw():
        return _rows({op: calls_of(op) for op in names}, rounds)


def step_times(rounds: int) -> list[dict[str, Any]]:
    """As ``host_times``, of the planned step in each precision."""
    calls = {f"step/{precision}": step_calls(precision) for precision in PRECISIONS}
    with kernels_on_a_cpu():
        return _rows(calls, rounds)


def _rows(calls: dict[str, dict[str, Call]], rounds: int) -> list[dict[str, Any]]:
    functions = {(name, pass_): call for name, passes in calls.items() for pass_, call in passes.items()}
    functions |= {(BASELINE, pass_): call for pass_, call in baseline().items()}
    seconds = measure(functions, rounds)
    rows = []
    for name, passes in calls.items():
        row: dict[str, Any] = {"op": name} | {pass_: seconds[name, pass_] for pass_ in passes}
        row |= {f"{pass_}_ratio": seconds[name, pass_] / seconds[BASELINE, pass_] for pass_ in passes}
        rows.append(row | {f"baseline_{pass_}": seconds[BASELINE, pass_] for pass_ in passes})
    return rows


def profile(op: str, rounds: int, lines: int = 40) -> None:
    """Print where Python spends the time of both passes of an op, by the functions' own time."""
    with kernels_on_a_cpu():
        call = list(calls_of(op).values())[-1]
        for _ in range(CALLS):
            call()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(rounds * CALLS):
            call()
        profiler.disable()
    print(f"{op}, {rounds * CALLS} calls; cProfile makes Python's functions dearer than they are")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def verify(names: Sequence[str]) -> None:
    """Compare ops with float64 on the tensors that are timed; runs in Triton's interpreter, in a process of its own.

    Args:
        names: of the ops.

    Raises:
        WrongResultError: a result is further off than rounding explains.
    """
    for op in names:
        spec = SPECS[op]
        SPECS[op] = replace(spec, inputs=lambda _, dtype, device, small=spec.small_inputs: small(LENGTH, device))
        size = Size("small", {}, 1, DROPOUT_P if spec.dropout else 0.0)
        # Of so few elements a root mean square is hardly a mean.
        ours = replace(implementations(op)[0], slack=2.0)
        verification.verify(Case(op, size, torch.float32, ours, spec.passes[-1]))


def verify_in_the_interpreter(names: Sequence[str]) -> None:
    """Run ``verify`` in a process where Triton interprets the kernels.

    Args:
        names: of the ops.

    Raises:
        UserError: an op is not as right as it has to be, and is not timed.
    """
    command = [sys.executable, "-m", "benchmarks.host_time", "--verify", "--op", ",".join(names)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"not timed: {done.stderr.strip().splitlines()[-1]}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of ``host_times`` as text: microseconds, and ratios to the baseline."""
    lines = [f"{'op':24}{'forward us':>12}{'ratio':>8}{'both us':>12}{'ratio':>8}"]
    shown = rows[:1] and {"op": BASELINE, **{p: rows[0][f"baseline_{p}"] for p in ("forward", "both")}}
    for row in [shown, *rows] if shown else rows:
        line = f"{row['op']:24}"
        for pass_ in ("forward", "both"):
            ratio = row.get(f"{pass_}_ratio", 1.0)
            line += f"{row[pass_] * 1e6:12.1f}{ratio:8.2f}" if pass_ in row else f"{'':20}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="only these, by commas")
    parser.add_argument("--step", action="store_true", help="the planned step in place of ops")
    parser.add_argument("--rounds", type=int, default=1000, help=f"rounds of {CALLS} calls each (default 1000)")
    parser.add_argument("--profile", action="store_true", help="show where the time goes; no records")
    parser.add_argument("--verify", action="store_true", help="only check the ops, under TRITON_INTERPRET=1")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    names = options.op.split(",") if options.op else list(SPECS)
    try:
        if unknown := set(names) - set(SPECS):
            raise UserError(f"--op: got {', '.join(sorted(unknown))}, expected some of {', '.join(SPECS)}")
        if options.verify:
            verify(names)
        elif options.profile:
            for op in names:
                profile(op, options.rounds)
        else:
            torch.set_num_threads(1)
            if options.step:
                rows = step_times(options.rounds)
            else:
                verify_in_the_interpreter(names)
                rows = host_times(names, options.rounds)
            print(table(rows))
            for row in rows:
                records.append(f"host_time/{row.pop('op')}", results=options.results, rounds=options.rounds, **row)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
