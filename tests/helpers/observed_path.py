"""Which path a call really takes, seen from what it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sclkern import reference
from sclkern.cpu import attention as cpu_attention
from sclkern.cpu import cross_attention as cpu_cross_attention
from sclkern.ops import dispatch


class _Kernels(TorchDispatchMode):
    """Records the calls of registered ops, of which ``depth`` run."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events, self.depth = events, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "sclkern":
            return function(*args, **(kwargs or {}))
        self.events.append(f"kernel {function._opname}")
        self.depth += 1
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.depth -= 1


class _Sdpa(TorchFunctionMode):
    """Records the calls of PyTorch's attention."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.events.append("sdpa")
        return function(*args, **(kwargs or {}))


def observe(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[str]:
    """What ``call`` runs, in order: "kernel NAME", "sdpa", "cpu NAME" or "reference NAME", with the form in which it
    absorbs.

    The inside of a kernel, which ``cpu_kernels`` computes by a definition, is left out.
    """
    events: list[str] = []
    kernels = _Kernels(events)

    def recorded(module, name, function):
        def run(*args, **options):
            if not kernels.depth:
                events.append(f"{module} {name}" + (f" {options['absorb']}" if "absorb" in options else ""))
            return function(*args, **options)

        return run

    with monkeypatch.context() as patch, kernels, _Sdpa(events):
        for name, function in list(vars(reference).items()):
            if callable(function):
                patch.setattr(reference, name, recorded("reference", name, function))
        for form in (cpu_attention, cpu_cross_attention):
            name = form.__name__.rpartition(".")[2]
            patch.setattr(form, name, recorded("cpu", name, getattr(form, name)))
        call()
    return events


def believe_in_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ops take their kernels on a CPU, where ``cpu_kernels`` computes; other problems stay."""
    problems = dispatch._problems

    def without_the_device(devices, dtypes):
        missing = ("kernels need a GPU", "Triton is not installed")
        return tuple(problem for problem in problems(devices, dtypes) if not problem.endswith(missing))

    monkeypatch.setattr(dispatch, "_problems", without_the_device)
