"""What the tests of ops share: where kernels run, the process in which Triton interprets them, every op's inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sclkern import ops
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted
from sclkern.tools.specs import SPECS, AccuracyShape, Inputs

KERNELS_RUN = torch.cuda.is_available() or interpreted()
needs_kernels = pytest.mark.skipif(not KERNELS_RUN, reason="no GPU, and not in Triton's interpreter")
DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * KERNELS_RUN
BACKENDS = ["eager"] + ["triton"] * KERNELS_RUN
# A seed of more than 32 bits.
SEED = 2**40 + 5
DIFFERENTIABLE = [name for name, spec in SPECS.items() if spec.differentiable]
DRAWS = [name for name in SPECS if name not in DIFFERENTIABLE]
# (op, shape) by name: every op at the shapes of the workload.
SHAPES = {f"{name} {shape.name}": (name, shape) for name, spec in SPECS.items() for shape in spec.accuracy}


class Calls(TorchDispatchMode):
    """Collects the calls of our ops that take torch's dispatcher: (function, args, kwargs)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sclkern":
            self.found.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def thorough_except(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases of a test, of which interpreted tests take the ``kept`` ones; `make test-sanitized` takes all."""
    cases = list(cases)
    assert all(case in cases for case in kept), "a case that is kept is none"
    return [case if case in kept else pytest.param(case, marks=pytest.mark.thorough) for case in cases]


def small_inputs(op: str, length: int) -> Inputs:
    """Float32 arguments of a few elements."""
    return SPECS[op].small_inputs(length, DEVICE)


def inputs_at(op: str, shape: AccuracyShape) -> Inputs:
    """Float32 arguments at a shape of the workload, with its dropout."""
    inputs = SPECS[op].inputs(shape.values, torch.float32, DEVICE)
    seed = torch.tensor([SEED], device=DEVICE)
    return inputs | ({"dropout_p": shape.dropout_p, "seed": seed} if shape.dropout_p else {})


def cast(op: str, inputs: Inputs, dtype: torch.dtype, float32: tuple[str, ...] = ()) -> Inputs:
    """The inputs with floating tensors in ``dtype``, as leaves where the op has gradients.

    Names in ``float32`` keep their dtype beside half precision.
    """

    def converted(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        unchanged = name in float32 and dtype.itemsize < 4
        return value.detach().to(value.dtype if unchanged else dtype).requires_grad_(name not in SPECS[op].frozen)

    return {name: converted(name, value) for name, value in inputs.items()}


def evaluate(op: str, inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    """The outputs "out" and "sum", and the gradient of a fixed random projection of them by every leaf, by name."""
    out = getattr(ops, op)(**inputs, **options)
    outputs = dict(zip(("out", "sum"), out if isinstance(out, tuple) else (out,), strict=False))
    leaves = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = [
        torch.randn(t.shape, generator=generator, device=DEVICE).to(t.dtype) if t.ndim else None
        for t in outputs.values()
    ]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    return {name: t.detach() for name, t in outputs.items()} | dict(zip(leaves, gradients, strict=True))


def assert_op_as_exact(op: str, arguments: Inputs, shape: AccuracyShape) -> None:
    """Root mean square and largest error are at most 1.5 times those of eager ops in the same dtype, plus rounding.

    Rounding is half a unit in the last place and a float32 unit of the largest intermediate value. The largest error
    gets two units in half precision and eight in float32, where sums in different orders meet.
    """
    exact = cast(op, arguments, torch.float64)
    form = {"absorb": "never"} if op == "cross_attention" else {}
    truth = evaluate(op, exact, backend="eager", **form)
    eager = evaluate(op, arguments, backend="eager", **form)
    ours = evaluate(op, arguments, backend="triton", **shape.kernel_options)
    failures = []
    for result, expected in truth.items():
        a, b = ours[result], eager[result]
        assert a.dtype == b.dtype and a.shape == b.shape, result
        eps, mean, largest = torch.finfo(a.dtype).eps, *_sizes(expected)
        intermediate = torch.finfo(torch.float32).eps * shape.magnitude
        (mean_error, largest_error), (mean_allowed, largest_allowed) = (_sizes(x - expected) for x in (a, b))
        if not mean_error <= 1.5 * mean_allowed + eps / 2 * mean + intermediate * max(mean, result == "out"):
            failures.append((result, "root mean square", mean_error, mean_allowed, mean))
        rounding = eps * (8 if a.dtype == torch.float32 else 2) * largest + intermediate * max(largest, result == "out")
        if not largest_error <= 1.5 * largest_allowed + rounding:
            failures.append((result, "largest", largest_error, largest_allowed, largest))
    assert not failures, failures


def _sizes(x: Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude."""
    return x.double().square().mean().sqrt().item(), x.abs().max().item()


def run_in_interpreter(file: str) -> None:
    """Run the tests of ``file`` that need kernels in a process whose Triton interprets them."""
    if interpreted():
        pytest.skip("this is the interpreter")
    if not TRITON_INSTALLED:
        pytest.skip("Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--sanitize"]
    command += ["-m", "not gpu and not thorough", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def assert_as_exact(ours: dict, eager: dict, truth: dict) -> None:
    """Tensors by name: ours at most 1.5 times as far from the truth in float64 as eager's, and rounding."""
    for name, exact in truth.items():
        a, b = ours[name], eager[name]
        assert a.dtype == b.dtype and a.shape == b.shape
        if not exact.numel():
            continue
        error, allowed = ((v.double() - exact).abs().max().item() for v in (a, b))
        # A unit in the last place of the largest value: half is what rounding the exact result costs, half is what the
        # largest of a few hundred equally distributed float32 errors differs by from one order of summing to another.
        rounding = torch.finfo(a.dtype).eps * exact.abs().max().item()
        assert error <= 1.5 * allowed + rounding, (name, error, allowed, rounding)
