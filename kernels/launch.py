"""Every launch of a kernel goes through ``launch``, so that launches can be recorded instead of run.

``recorded`` is how tuning and tests see what an op would launch, on tensors without memory and without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sclkern.kernels.config import LaunchConfig


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


def launch(
    kernel: Any, grid: tuple[int, ...], config: LaunchConfig, fp_fusion: bool = True, /, **arguments: Any
) -> None:
    """Launch a kernel in a configuration.

    Args:
        kernel: the jit function.
        grid: programs along each axis.
        config: its constants, warps and stages.
        fp_fusion: whether a product and a sum may be rounded once.
        **arguments: the other arguments of the kernel by name.
    """
    if _recorders:
        named = arguments | config.options | {"enable_fp_fusion": fp_fusion}
        _recorders[-1].append(Launch(kernel, grid, config, named))
        return
    kernel[grid](**arguments, **config.options, enable_fp_fusion=fp_fusion)


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
