"""What a computation on fake CUDA tensors would allocate, and when."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sclkern.ops._registration import LAUNCHERS, kernels
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted


@dataclass
class Allocation:
    """A storage of a CUDA tensor.

    Attributes:
        bytes: of it.
        section: of ``Allocations`` in which it was made.
        shape: of the tensor that it was made for.
        dtype: likewise.
        start: time at which it was made, counted in allocations and frees.
        stop: time at which it was freed; None while it is held.
    """

    bytes: int
    section: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    stop: int | None = None


class Allocations(TorchDispatchMode):
    """Inside, allocations of CUDA tensors are recorded; to be entered after a ``FakeTensorMode``.

    The kernels' launchers run too, whose workspaces count; no kernel is launched.

    Attributes:
        section: name under which what follows is recorded.
        made: all allocations, in their order.
    """

    section: str
    made: list[Allocation]

    def __init__(self) -> None:
        super().__init__()
        self.section = ""
        self.made = []
        self._held: dict[int, Allocation] = {}
        self._clock = itertools.count()
        self._launchers = TRITON_INSTALLED and not interpreted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sclkern" and self._launchers:
            with self, kernels.launch.recorded():
                return LAUNCHERS[func._schema.name.split("::")[1]](*args, **kwargs)
        if func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
                self._see(leaf)
        return out

    def of(self, tensor: Tensor) -> Allocation:
        """The allocation that a tensor made inside lies in."""
        return self._held[tensor.untyped_storage()._cdata]

    def peak(self) -> tuple[int, list[Allocation]]:
        """The most bytes that were held at once, and what was held then."""
        changes = [(one.start, one.bytes) for one in self.made]
        changes += [(one.stop, -one.bytes) for one in self.made if one.stop is not None]
        held = list(itertools.accumulate(size for _, size in sorted(changes)))
        if not held:
            return 0, []
        most = max(held)
        time = sorted(changes)[held.index(most)][0]
        return most, [one for one in self.made if one.start <= time and (one.stop is None or one.stop > time)]

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        one = Allocation(storage.nbytes(), self.section, tensor.shape, tensor.dtype, next(self._clock))
        self._held[key] = one
        self.made.append(one)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._held.pop(key).stop = next(self._clock)
