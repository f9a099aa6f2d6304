"""Every launch of a kernel goes through ``launch``, so that launches can be recorded instead of run.

``recorded`` is how tuning and tests see what an op would launch, on tensors without memory and without a GPU.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sclkern.kernels.config import LaunchConfig, on_override


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded.

    Attributes:
        kernel: the jit function.
        grid: programs along each axis.
        config: the launch configuration.
        arguments: all arguments by name, options of the compiler among them.
    """

    kernel: Any
    grid: tuple[int, ...]
    config: LaunchConfig
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return math.prod(self.grid)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that differ in their tensors alone."""
        numbers = {name: value for name, value in self.arguments.items() if not isinstance(value, Tensor)}
        return self.config.kernel, self.grid, tuple(sorted(numbers.items(), key=str))


_recorders: list[list[Launch]] = []


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are appended to the list that is yielded, and do not run."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


class Prepared:
    """A launch of which all but the tensors is settled: what a launcher keeps for the shapes of its arguments. A grid
    without programs launches nothing.

    The first call for some dtypes goes through Triton's binder, which compiles. The kernel that it returns is launched
    directly from then on, on tensors whose addresses are multiples of 16, as torch's allocators give them: with the
    same numbers the binder would find the same kernel. For other addresses it is asked.

    Attributes:
        config: the launch configuration.
        grid: programs along each axis.
        tensors: names of the tensors, in the order of the kernel's parameters.
    """

    config: LaunchConfig
    grid: tuple[int, ...]
    tensors: list[str]

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], config: LaunchConfig, fp_fusion: bool = True, /, **numbers: Any
    ) -> None:
        """Settle a launch.

        Args:
            kernel: the jit function; its first parameters are its tensors.
            grid: programs along each axis.
            config: its constants, warps and stages.
            fp_fusion: whether a product and a sum may be rounded once.
            **numbers: its other arguments that are no tensors, by name.
        """
        self.config, self._kernel, self.grid, self._programs = config, kernel, grid, math.prod(grid)
        self._named = numbers | config.options | {"enable_fp_fusion": fp_fusion}
        names = list(inspect.signature(kernel.fn).parameters)
        self.tensors = [name for name in names if name not in self._named]
        # By position, as the compiled kernel takes them.
        self._numbers = tuple(self._named[name] for name in names[len(self.tensors) :])
        self._compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch.

        Args:
            *tensors: in the order of the kernel's parameters, all on one device.
        """
        if not self._programs:
            return
        if not _recorders:
            address = 0
            key: list[Any] = []
            for tensor in tensors:
                if tensor is None:
                    key.append(None)
                else:
                    address |= tensor.data_ptr()
                    key.append(tensor.dtype)
                    device = tensor
            key.append(device.get_device())
            aligned = not address & 15
            if aligned and (compiled := self._compiled.get(tuple(key))) is not None:
                compiled(*tensors, *self._numbers)
                return
        arguments = dict(zip(self.tensors, tensors, strict=True)) | self._named
        if _recorders:
            _recorders[-1].append(Launch(self._kernel, self.grid, self.config, arguments))
            return
        kernel = self._kernel[self.grid](**arguments)
        # The interpreter returns none. On AMD the binder also asks for the sizes of storages.
        if aligned and hasattr(kernel, "packed_metadata") and not torch.version.hip:
            self._compiled[tuple(key)] = kernel[(*self.grid, 1, 1)[:3]]


def launch(
    kernel: Any, grid: tuple[int, ...], config: LaunchConfig, fp_fusion: bool = True, /, **arguments: Any
) -> None:
    """Launch a kernel in a configuration; numbers that differ from call to call make it slower than ``Prepared``.

    Args:
        kernel: the jit function.
        grid: programs along each axis.
        config: its constants, warps and stages.
        fp_fusion: whether a product and a sum may be rounded once.
        **arguments: the other arguments of the kernel by name.
    """
    values = tuple(arguments.values())
    key = id(kernel), tuple(arguments), tuple(map(type, values))
    if (call := _calls.get(key)) is None:
        call = _calls[key] = _Call(kernel, arguments)
    numbers = call.numbers(values)
    if (prepared := call.prepared.get((grid, config, fp_fusion, numbers))) is None:
        if len(call.prepared) >= MAX_PREPARED:
            call.prepared.clear()
        named = {name: arguments[name] for name in call.named}
        prepared = call.prepared[grid, config, fp_fusion, numbers] = Prepared(kernel, grid, config, fp_fusion, **named)
    prepared(*call.tensors(values))


class _Call:
    """A call of ``launch`` with some types of arguments: picks its tensors, in the kernel's order, and its numbers."""

    def __init__(self, kernel: Any, arguments: dict[str, Any]) -> None:
        names = list(arguments)
        absent_or_tensor = [n for n, value in arguments.items() if value is None or isinstance(value, Tensor)]
        tensors = [name for name in inspect.signature(kernel.fn).parameters if name in absent_or_tensor]
        self.named = [name for name in names if name not in tensors]
        self.tensors, self.numbers = (operator.itemgetter(*map(names.index, some)) for some in (tensors, self.named))
        self.prepared: dict[Any, Prepared] = {}


# By kernel, names and types of the arguments, because 1, 1.0 and True are equal.
_calls: dict[Any, _Call] = {}
on_override(_calls.clear)
# Launches that a call keeps.
MAX_PREPARED = 1024


def static_entry(
    kernel: Any, config: LaunchConfig, signature: dict[str, str], *, divisible: Any = (), **constants: Any
) -> dict[str, Any]:
    """A kernel in a configuration, as the static checks compile it (``sclkern.tools.static``).

    Args:
        kernel: the jit function.
        config: its configuration.
        signature: types of the pointers, and of scalars that are not int32.
        divisible: integers that are multiples of 16 at the real shapes, such as strides.
        **constants: other constants of the kernel, and None for pointers that are absent.

    Returns:
        The entry.
    """
    return {
        "kernel": kernel,
        "signature": {name: kind for name, kind in signature.items() if name in kernel.arg_names},
        "constants": constants | dict(config.constants),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "divisible": [name for name in divisible if name in kernel.arg_names],
    }
