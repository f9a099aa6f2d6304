"""Launches on the stub: prepared as on a GPU, by Triton's binder too; computed by the definition of the op."""

from __future__ import annotations

from typing import Any

import torch
import triton

import cpu_kernels
import sclkern
from benchmarks.harness.idle_driver import Driver, Kernel
from sclkern.ops._registration import RUNNERS
from stub_gpu.redirect import truth

_LIBRARY = torch.library.Library("sclkern", "IMPL")
_compile = triton.compiler.compile


def _compiled(source: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
    if isinstance(triton.runtime.driver.active, Driver):
        return Kernel(source, lambda *arguments: None)
    # Compilation ahead, for a target that is named.
    return _compile(source, target, options, **others)


def _truly(compute):
    def run(*arguments, **options):
        with truth():
            return compute(*arguments, **options)

    run.tells_the_truth = True
    return run


def _both(launch, compute):
    def run(*arguments):
        launch(*arguments)
        return compute(*arguments)

    return run


def install() -> None:
    # Modules are tried on the CPU before they are fused.
    sclkern.fuse = _truly(sclkern.fuse)
    triton.compiler.compile = _compiled
    triton.runtime.driver.set_active(Driver())
    launchers = {name: runners["cuda"] for name, runners in RUNNERS.items()}
    register = cpu_kernels._install
    cpu_kernels._install = lambda name, function: register(name, _truly(function))
    cpu_kernels.install()
    for name, runners in RUNNERS.items():
        compute = runners["cpu"]
        if not hasattr(compute, "tells_the_truth"):
            # Ops with a kernel of their own on a CPU, which asks its tensors where they are.
            compute = _truly(compute)
            _LIBRARY.impl(name, compute, "CPU", allow_override=True)
        runners["cuda"] = _both(launchers[name], compute)
