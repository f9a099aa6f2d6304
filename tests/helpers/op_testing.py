"""What the tests of ops share: where kernels run here, and the process in which Triton interprets them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted

KERNELS_RUN = torch.cuda.is_available() or interpreted()
needs_kernels = pytest.mark.skipif(not KERNELS_RUN, reason="no GPU, and not in Triton's interpreter")
DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
# Triton's interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
BACKENDS = ["eager"] + ["triton"] * KERNELS_RUN


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
