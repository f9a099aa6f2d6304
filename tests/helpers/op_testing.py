"""What the tests of ops share: where kernels run, the process in which Triton interprets them, every op's inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sclkern import ops
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted
from sclkern.tools.specs import SPECS, AccuracyShape, Inputs

KERNELS_RUN = torch.cuda.is_available() or interpreted()
needs_kernels = pytest.mark.skipif(not KERNELS_RUN, reason="no GPU, and not in Triton's interpreter")
DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
# Triton's interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
BACKENDS = ["eager"] + ["triton"] * KERNELS_RUN
# A seed of more than 32 bits.
SEED = 2**40 + 5
DIFFERENTIABLE = [name for name, spec in SPECS.items() if spec.differentiable]
DRAWS = [name for name in SPECS if name not in DIFFERENTIABLE]
# (op, shape) by name: every op at the shapes of the workload.
SHAPES = {f"{name} {shape.name}": (name, shape) for name, spec in SPECS.items() for shape in spec.accuracy}


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


def run_in_interpreter(file: str) -> None:
    """Run the tests of ``file`` that need kernels in a process whose Triton interprets them."""
    if interpreted():
        pytest.skip("this is the interpreter")
    if not TRITON_INSTALLED:
        pytest.skip("Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
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
