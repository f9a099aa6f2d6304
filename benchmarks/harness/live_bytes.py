"""The memory that code would take, without taking it: its tensors counted under FakeTensorMode.

What is counted are the storages that PyTorch's operators return, from the operator to the last reference, autograd's
included. What an operator allocates for itself and frees before it returns is not seen, nor what a custom op or a
compiled function does inside. Where both exist, the counts of the contrasts equal the allocator's to a thousandth
(``tests/benchmarks/test_contrasts.py``).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _EnoughError(Exception):
    """As many operators have run as were wanted."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make inside, of which views and inputs are none.

    Args:
        most_operators: operators after which ``counted`` ends, for loops whose rounds take equal memory.

    Attributes:
        live: bytes now.
        peak: the most bytes so far.
        operators: operators so far.
    """

    def __init__(self, most_operators: float = float("inf")) -> None:
        super().__init__()
        self.live = self.peak = self.operators = 0
        self._most, self._bytes = most_operators, dict[int, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if (key := storage._cdata) in given or key in self._bytes:
                continue
            self._bytes[key] = storage.nbytes()
            self.live += self._bytes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)
        self.operators += 1
        if self.operators >= self._most:
            raise _EnoughError
        return out

    def _free(self, key: int) -> None:
        self.live -= self._bytes.pop(key)


@contextlib.contextmanager
def counted(most_operators: float = float("inf")) -> Iterator[LiveBytes]:
    """Count what runs inside, to its end or to as many operators.

    Args:
        most_operators: see ``LiveBytes``.
    """
    counter = LiveBytes(most_operators)
    with contextlib.suppress(_EnoughError), counter:
        yield counter


def computed_peak(
    make_inputs: Callable[[], Any], call: Callable[[Any], object], most_operators: float = float("inf")
) -> int:
    """The peak of a call beside its inputs, in bytes; nothing of it is allocated or computed.

    Args:
        make_inputs: makes the inputs, by operators that FakeTensorMode knows; on any device, "cuda" without a GPU too.
        call: takes them. It must not read a value of a tensor.
        most_operators: see ``LiveBytes``.
    """
    with FakeTensorMode():
        inputs = make_inputs()
        with counted(most_operators) as counter:
            call(inputs)
    return counter.peak


def measured_peak(call: Callable[[], object]) -> int:
    """The peak of a call beside what was allocated before it, in bytes, by the allocator of the GPU or of the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    from benchmarks.harness.profiler_trace import peak_bytes, record_trace

    return peak_bytes(record_trace(call))
