"""What a run shows of itself beside its losses: learning rates, and of each process its times and memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from sclkern.profiling import time_waiting
from sclkern.training.memory import held_bytes

# Share of a step that may wait for data, and by how much a process may lag behind the others.
MAX_WAIT, MAX_LAG = 0.1, 0.25
# Steps that a warning looks at, and logged steps in a row in which a process must lag.
WINDOW, TIMES = 20, 3


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rates of a step: ``learning_rate`` of the encoders, ``learning_rate_fusion`` and ``_heads``."""
    rates = {group["name"].removesuffix("_no_decay"): group["lr"] for group in optimizer.param_groups}
    return {"learning_rate" + ("" if part == "body" else f"_{part}"): rate for part, rate in rates.items()}


class Meetings:
    """Times how long a process waits for the others: in gathers of features and counts, and at the end of a backward.

    On a CPU by the clock of the host; on a GPU by events, of which the host waits for none before ``seconds``.

    Args:
        device: that trains.
        alone: whether there is no other process.
    """

    def __init__(self, device: torch.device, *, alone: bool) -> None:
        self._on_gpu, self._alone = device.type == "cuda", alone
        self._seconds = 0.0
        self._pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> Meetings:
        if not self._alone:
            time_waiting(self.waiting)
        return self

    def __exit__(self, *_: object) -> None:
        time_waiting(None)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside waits for other processes."""
        begin = self._now()
        yield
        self._add(begin)

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """Around a backward, at whose end the processes average their gradients.

        Args:
            loss: whose backward it is.
        """
        if self._alone:
            yield
            return
        ends: list[Any] = []

        def begin(_: Tensor) -> None:
            # Callbacks run in their order when all gradients are computed: before DDP waits for its own.
            Variable._execution_engine.queue_callback(lambda: ends.append(self._now()))

        handle = loss.register_hook(begin)
        yield
        handle.remove()
        for end in ends:
            self._add(end)

    def seconds(self) -> float:
        """Seconds since the last call."""
        waited, self._seconds = self._seconds, 0.0
        pairs, self._pairs = self._pairs, []
        return waited + sum(begin.elapsed_time(end) / 1e3 for begin, end in pairs)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, begin: Any) -> None:
        if self._on_gpu:
            self._pairs.append((begin, self._now()))
        else:
            self._seconds += time.perf_counter() - begin


class Processes:
    """Compares the processes of a run at its logged steps.

    Args:
        device: that trains.
        num_workers: of the loader, for the remedy.
    """

    def __init__(self, device: torch.device, num_workers: int) -> None:
        self.device, self.num_workers = device, num_workers
        self._lagged: list[int] = []
        self._steps, self._waited, self._took = 0, 0.0, 0.0
        self._said: set[str] = set()

    def own(self, step_seconds: float, data_seconds: float, waited_seconds: float) -> dict[str, float]:
        """What the other processes learn of this one.

        Args:
            step_seconds: of a step.
            data_seconds: of them, waiting for data.
            waited_seconds: of them, waiting for other processes.

        Returns:
            Values by name.
        """
        return {
            "step_seconds": step_seconds,
            "own_seconds": max(0.0, step_seconds - waited_seconds),
            "data_seconds": data_seconds,
            "memory_gb": held_bytes(self.device) / 1e9,
        }

    def compare(self, ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """What a log shows of all processes.

        Args:
            ranks: ``own`` of each.

        Returns:
            ``memory_gb``, the most of any; with several also ``slowest_rank``, by the time without waiting for others,
            and ``slowest_lag``, the share by which it is slower than the median.
        """
        found = {"memory_gb": max(rank["memory_gb"] for rank in ranks)}
        if len(ranks) > 1:
            times = [rank["own_seconds"] for rank in ranks]
            slowest, median = max(range(len(times)), key=times.__getitem__), statistics.median_low(times)
            found |= {"slowest_rank": slowest, "slowest_lag": times[slowest] / median - 1 if median else 0.0}
        return found

    def warnings(self, ranks: Sequence[Mapping[str, float]], steps: int) -> list[str]:
        """Lines for the log, each of which is said once in a run.

        Args:
            ranks: ``own`` of each.
            steps: over which their times are means.

        Returns:
            Lines; none where nothing is wrong.
        """
        lines = {"data": self._data_wait(ranks, steps), "lag": self._lag(ranks)}
        new = {name: line for name, line in lines.items() if line and name not in self._said}
        self._said |= set(new)
        return list(new.values())

    def _data_wait(self, ranks: Sequence[Mapping[str, float]], steps: int) -> str | None:
        worst = max(ranks, key=lambda rank: rank["data_seconds"])
        self._steps += steps
        self._waited += steps * worst["data_seconds"]
        self._took += steps * worst["step_seconds"]
        if self._steps < WINDOW:
            return None
        share, seen = self._waited / self._took if self._took else 0.0, self._steps
        self._steps, self._waited, self._took = 0, 0.0, 0.0
        if share <= MAX_WAIT:
            return None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return (
            f"a step waits for data {share:.0%} of its time (mean of {seen} steps): raise data.num_workers (now "
            f"{self.num_workers}; {cores} cores here, shared by the processes of this machine), store smaller images, "
            "or move the data to a faster disk"
        )

    def _lag(self, ranks: Sequence[Mapping[str, float]]) -> str | None:
        found = self.compare(ranks)
        rank, lag = int(found.get("slowest_rank", -1)), found.get("slowest_lag", 0.0)
        self._lagged = [*self._lagged, rank][-TIMES:] if lag > MAX_LAG else []
        if len(self._lagged) < TIMES or len(set(self._lagged)) > 1:
            return None
        return (
            f"rank {rank} is the slowest: its steps take {lag:.0%} longer than the median, without waiting for others; "
            "look at its data, its machine's clock and temperature, and who else uses it"
        )
