"""The processes of a run, which torchrun starts, and what they tell each other."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sclkern.errors import RankError
from sclkern.training.failures import Failure, FailureWatch, first_failure, left_alone, tell

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Place:
    """What the environment says of a process.

    Attributes:
        rank: number of the process.
        size: number of processes.
        local_rank: number of the process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


class World:
    """The processes that train together: a context manager that ends all of them when one fails.

    Every method is called by all of them at the same point. With one process each returns what it was given.

    Args:
        place: of this process.
        store: of the processes; None for one process.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process on its machine.
        control: group on CPUs for small messages, which wait for no GPU; None for one process.
    """

    rank: int
    size: int
    local_rank: int
    control: dist.ProcessGroup | None

    def __init__(self, place: Place | None = None, store: dist.Store | None = None) -> None:
        place = place or Place()
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local_rank
        self.store = store
        self.control = dist.group.WORLD if self.size > 1 else None
        self._watch: FailureWatch | None = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """ "rank 1 of 4", for messages."""
        return f"rank {self.rank} of {self.size}"

    def __enter__(self) -> Self:
        if self.store is not None:
            self._watch = FailureWatch(self.store, self.rank)
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.stop()
        if self.store is None:
            return
        if error is None:
            try:
                # Whoever holds the store must not end before the others have read from it.
                _part(self.control)
                dist.destroy_process_group()
            except RuntimeError as broken:
                error = broken
        if error is not None:
            self._end_all(error)

    def _end_all(self, error: BaseException) -> None:
        """Tell the others of this failure; or, if another process has failed first, raise its failure."""
        assert self.store is not None
        if left_alone(error):
            gone = Failure(-1, 3, "another process ended without a word, such as by kill -9; go on with --resume")
            try:
                first = first_failure(self.store, seconds=2.0) or gone
            except KeyboardInterrupt:  # torchrun ends the others when a process has died
                first = gone
        else:
            first = tell(self.store, Failure.of(error, self.rank))
        if first.rank != self.rank:
            # One line for the whole run, from rank 0 and from the rank that failed.
            raise RankError(str(first) if self.main else "", first.status) from error

    # -- what they tell each other -------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all."""
        self.gather(None)

    def gather(self, value: _Value) -> list[_Value]:
        """The values of all ranks, in their order.

        Args:
            value: anything that pickle takes, small.

        Returns:
            One of each rank.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: _Value | None) -> _Value:
        """The value of rank 0.

        Args:
            value: tensors and plain values, in dictionaries and lists of any depth; read on rank 0 only.

        Returns:
            The value; tensors are on the CPU, except on rank 0 itself.
        """
        if self.size == 1:
            return value  # type: ignore[return-value]
        tensors: list[Tensor] = []
        message = [_take_out(value, tensors) if self.main else None]
        dist.broadcast_object_list(message, 0, group=self.control)
        if self.main:
            for tensor in tensors:
                dist.broadcast(tensor.detach().cpu().contiguous(), 0, group=self.control)
            return value  # type: ignore[return-value]

        def receive(slot: _Slot) -> Tensor:
            tensor = torch.empty(slot.shape, dtype=slot.dtype)
            dist.broadcast(tensor, 0, group=self.control)
            return tensor

        received: _Value = _put_in(message[0], receive)
        return received

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; all have the same names in the same order."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return dict(zip(values, (total / self.size).tolist(), strict=True))


class Agreement:
    """What any of the processes has to say at a step, found out while they compute.

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._said: Tensor | None = None
        self._work: dist.Work | None = None

    def ask(self, *flags: bool) -> None:
        """Begin to find out for which of these any process says True; does not wait."""
        self._said = torch.tensor(flags, dtype=torch.int64)
        if self.world.size > 1:
            self._work = dist.all_reduce(self._said, dist.ReduceOp.MAX, group=self.world.control, async_op=True)

    def answer(self) -> list[bool]:
        """For each flag whether any process said True; the same on all."""
        assert self._said is not None
        if self._work is not None:
            self._work.wait()
        self._work = None
        return [bool(flag) for flag in self._said.tolist()]


def _part(group: dist.ProcessGroup | None, works: int = 8, patience: float = 5.0) -> None:
    """Wait for all, and until the threads of a gloo group hold no tensor.

    Letting go of one takes the interpreter's lock, and aborts the process if the interpreter is about to end. Works
    follow one another in each of the group's two threads, so that earlier ones are over when these are.

    Args:
        group: of the processes.
        works: collectives, several for each thread.
        patience: seconds that are waited for the threads.
    """
    tensors = [torch.zeros(1) for _ in range(works)]
    for work in [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]:
        work.wait()
    held = [weakref.ref(tensor) for tensor in tensors]
    del tensors, work
    end = time.monotonic() + patience
    while any(tensor() is not None for tensor in held) and time.monotonic() < end:
        time.sleep(0.001)


# -- tensors in a message ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor that is sent by itself."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _take_out(item, tensors) for key, item in value.items()}
    return [_take_out(item, tensors) for item in value] if isinstance(value, list) else value


def _put_in(value: Any, receive: Callable[[_Slot], Tensor]) -> Any:
    if isinstance(value, _Slot):
        return receive(value)
    if isinstance(value, dict):
        return {key: _put_in(item, receive) for key, item in value.items()}
    return [_put_in(item, receive) for item in value] if isinstance(value, list) else value
