"""Which backend an op takes, and why. Nothing is chosen silently: ``sclkern.ops.explain`` tells the same reason."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "eager")
# Asked once: torch.compile does not trace the question.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """``backend`` is "triton" or "eager"."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (``TRITON_INTERPRET=1``, set before Triton loads)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def asked(backend: str) -> str:
    """What was asked for: ``backend``, or what ``SCLKERN_BACKEND`` says where that is "auto"."""
    return os.environ.get("SCLKERN_BACKEND", backend) if backend == "auto" else backend


def may_read(tensor: Tensor) -> bool:
    """Whether the values of an argument may be read to check them: on a CPU always, on a GPU, where that waits for the
    device, under ``SCLKERN_DEBUG=1``; never while torch.compile traces."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("SCLKERN_DEBUG") == "1"


def choose(*tensors: Tensor, backend: str = "auto", unsupported: str | None = None) -> Choice:
    """Pick the backend for these tensors.

    Args:
        tensors: the floating-point inputs of the op.
        backend: "auto" is ``SCLKERN_BACKEND`` where that is set, and then Triton where it can run.
        unsupported: what the op's kernel cannot do of what was asked for, or None.

    Raises:
        ValueError: unknown backend, or Triton was asked for by name and cannot run.
    """
    source = "backend"
    if backend == "auto" and "SCLKERN_BACKEND" in os.environ:
        backend, source = os.environ["SCLKERN_BACKEND"], "SCLKERN_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "eager":
        return Choice("eager", f"asked for by {source}")
    problem = unsupported or _problem(tensors)
    if problem is None:
        return Choice("triton", "Triton's interpreter" if interpreted() else f"tensors on {tensors[0].device}")
    if backend == "triton":
        raise ValueError(f"{source}='triton': cannot run: {problem}")
    return Choice("eager", problem)


def _problem(tensors: tuple[Tensor, ...]) -> str | None:
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        return f"tensors on different devices {sorted(map(str, devices))}"
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')} has no kernel"
        if interpreted() and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    if not interpreted() and next(iter(devices)).type != "cuda":
        return f"tensors on {next(iter(devices))}, kernels need a GPU"
    return None
