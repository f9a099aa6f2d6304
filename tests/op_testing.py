"""What the tests of ops share: where kernels run here, and the process in which Triton interprets them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sclkern.dispatch import TRITON_INSTALLED, interpreted

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
