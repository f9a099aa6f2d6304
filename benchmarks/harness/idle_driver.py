"""A driver of Triton that launches nothing, so that the ops' path to their kernels can be timed without a GPU.

What Python does for a launch is done: the op, its checks, its launcher, Triton's binder and the look-up of the compiled
kernel. What is left out is the compiler, and the C code that hands arguments to the GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from sclkern.kernels.config import override
from sclkern.ops import _registration, dispatch

# No device of this machine, so that what Triton keeps for it is not mistaken for that of a GPU.
DEVICE = 1_000_000
Launched = Callable[..., None]


class Driver:
    """A GPU of compute capability 9.0 that takes no time."""

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Kernel(triton.compiler.CompiledKernel):
    """What the compiler would return."""

    def __init__(self, source: Any, launched: Launched) -> None:
        self.src, self.name, self.function, self.packed_metadata = source, source.fn.__name__, 0, ()
        self.module, self._module_pid, self._run = self, None, launched

    def __del__(self) -> None:
        # The kernel of Triton would unload the module.
        pass


def _nothing(*arguments: Any) -> None:
    pass


@contextmanager
def idle_driver(launched: Launched = _nothing) -> Iterator[None]:
    """Inside, kernels are launched on tensors of any device, without being compiled or run.

    Args:
        launched: called for each launch with the arguments of Triton's launcher: the grid, the stream, four of its own,
            two hooks, and the arguments of the kernel.
    """
    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type]
    compiled = mock.patch("triton.compiler.compile", lambda source, **options: Kernel(source, launched))
    try:
        # An override of nothing: launchers keep no kernel from before, nor one from here.
        with compiled, override(()):
            yield
    finally:
        triton.runtime.driver.set_active(None)  # type: ignore[arg-type]
        modules = [module for name, module in list(sys.modules.items()) if name.startswith("sclkern.kernels.")]
        for value in (value for module in modules for value in vars(module).values()):
            if isinstance(value, triton.runtime.JITFunction):
                value.device_caches.pop(DEVICE, None)


@contextmanager
def kernels_on_a_cpu(launched: Launched = _nothing) -> Iterator[None]:
    """As ``idle_driver``; and the ops take their kernels on CPU tensors, and read no values, as on a GPU.

    Args:
        launched: as of ``idle_driver``.
    """
    ops = [sys.modules[op.__module__] for op in _registration.OPS.values()]
    changes: list[tuple[Any, str, Any]] = [(dispatch, "_problems", lambda devices, dtypes: ())]
    for name, value in {"may_read": lambda tensor: False, "interpretable": lambda *arguments: True}.items():
        changes += [(module, name, value) for module in (dispatch, _registration, *ops) if hasattr(module, name)]
    with idle_driver(launched), ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        stack.enter_context(mock.patch.object(_registration, "SETTLED_ON", {"cpu"}))
        for runners in _registration.RUNNERS.values():
            stack.enter_context(mock.patch.dict(runners, cpu=runners["cuda"]))
        yield
