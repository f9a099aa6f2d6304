"""A process that makes no progress any more ends the run with its name, instead of letting all wait for it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Self

import torch.distributed as dist

from sclkern.training.failures import Failure, tell

# Exit status of every process of a run in which one hangs.
HANGS = 4
_ALIVE = "sclkern/alive"
# Where a frame waits for other processes: in torch's collectives, in a backward that sums gradients, in our messages.
_WAITS = ("torch/distributed/", "torch/autograd/graph.py", "sclkern/training/world.py", "sclkern/distributed.py")


@dataclass
class Report:
    """What a process says of itself.

    Attributes:
        tick: how often it has reported.
        step: the step that it takes.
        seconds: since it passed a place where it reports progress.
        where: what its main thread does.
        waits: whether that is a wait for the other processes.
    """

    tick: int
    step: int
    seconds: float
    where: str
    waits: bool


class Watchdog:
    """Watches the main thread of this process while it is entered, and hears of the other processes'.

    Time in which the whole process was stopped, as by Ctrl-Z, does not count.

    Args:
        seconds: how long a process may make no progress; 0 watches nothing.
        step: gives the step that is taken.
        store: of the processes; None for one by itself.
        rank: of this process.
        size: number of processes.
        end: ends the process with a status; for tests.
    """

    def __init__(
        self,
        seconds: float,
        step: Callable[[], int],
        *,
        store: dist.Store | None = None,
        rank: int = 0,
        size: int = 1,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.seconds = seconds
        self.step = step
        self.rank, self.size = rank, size
        self._end = end
        self._interval = min(5.0, seconds / 8)
        # A connection of its own, because a call that waits holds it.
        self._store = store.clone() if store is not None and seconds else None
        self._thread_id = 0
        self._still = 0.0
        self._own = Report(0, 0, 0.0, "", False)
        # Of each other process: its last report, and when it came.
        self._heard: dict[int, tuple[Report, float]] = {}
        self._left = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self.seconds:
            self._thread_id = threading.get_ident()
            self.beat()
            self._look()
            self._threads = [threading.Thread(target=self._watch, daemon=True)]
            if self._store is not None:
                # By itself, because a store whose process hangs does not answer.
                self._threads.append(threading.Thread(target=self._exchange, args=(self._store,), daemon=True))
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        # An interpreter that ends while one of them is in the store would end in an abort.
        for thread in self._threads:
            thread.join(5.0)

    def beat(self) -> None:
        """Report progress; takes no time."""
        self._still = 0.0

    def _watch(self) -> None:
        while not self._left.wait(self._interval):
            self._still += self._interval
            self._look()
            if self._still > self.seconds:
                self._end_run()
                return

    def _look(self) -> None:
        where, waits = describe(sys._current_frames().get(self._thread_id))
        self._own = Report(self._own.tick + 1, self.step() + 1, self._still, where, waits)

    def _exchange(self, store: dist.Store) -> None:
        others = [rank for rank in range(self.size) if rank != self.rank]
        with contextlib.suppress(dist.DistError, RuntimeError):  # the process that holds the store has gone
            # At once, so that a process that stops early has said something.
            while True:
                store.set(f"{_ALIVE}/{self.rank}", json.dumps(asdict(self._own)))
                for rank in others:
                    if store.check([key := f"{_ALIVE}/{rank}"]):
                        report = Report(**json.loads(store.get(key)))
                        if rank not in self._heard or self._heard[rank][0].tick != report.tick:
                            self._heard[rank] = report, time.monotonic()
                if self._left.wait(self._interval):
                    return

    def _end_run(self) -> None:
        """End all processes, with the name of the one that hangs."""
        now = time.monotonic()
        reports = {self.rank: self._own} | {rank: report for rank, (report, _) in self._heard.items()}
        silent = {rank for rank, (_, heard) in self._heard.items() if now - heard > 4 * self._interval}
        silent |= set(range(self.size)) - set(reports)
        failure = Failure(self.rank, HANGS, blame(reports, silent, self.size))
        told: list[Failure] = []
        if (store := self._store) is not None:
            # By itself too; then nobody learns what the others say.
            teller = threading.Thread(target=lambda: told.append(tell(store.clone(), failure)), daemon=True)
            teller.start()
            teller.join(5.0)
        first = told[0] if told else failure
        if first.rank == self.rank:  # the others say nothing
            os.write(2, f"\nsclkern pretrain: error: {failure.message}\n".encode())
        self._end(HANGS)


def blame(reports: dict[int, Report], silent: set[int], size: int) -> str:
    """Say which process hangs, and where, from what all have said of themselves.

    Args:
        reports: the last of each process that has reported.
        silent: processes that no longer report, or never did.
        size: number of processes.

    Returns:
        One line.
    """
    first = min(report.step for report in reports.values())
    # Whoever is behind, and does not wait for the others.
    hanging = silent or {rank for rank, report in reports.items() if report.step == first and not report.waits}
    hanging = hanging or {rank for rank, report in reports.items() if report.step == first}

    def told(rank: int) -> str:
        name = f"rank {rank}" if size > 1 else "the run"
        if rank not in reports:
            return f"{name} hangs and has said nothing"
        report = reports[rank]
        how = "has stopped" if rank in silent else f"hangs for {report.seconds:.0f} s"
        return f"{name} {how} in step {report.step}, in {report.where}"

    waiting = {rank: report for rank, report in reports.items() if rank not in hanging}
    text = "; ".join(told(rank) for rank in sorted(hanging))
    if waiting:
        where = sorted({report.where for report in waiting.values()})
        names = ", ".join(map(str, sorted(waiting)))
        text += f"; rank{'s' * (len(waiting) > 1)} {names} wait{'s' * (len(waiting) == 1)} in {', '.join(where)}"
    return f"{text}; go on with --resume, and raise run.watchdog_seconds if this was only slow"


def describe(frame: FrameType | None) -> tuple[str, bool]:
    """What a thread does.

    Args:
        frame: its innermost frame.

    Returns:
        The collective or function and the line of this package that called it, and whether it waits for others.
    """
    collective = ""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not collective and any(part in file for part in _WAITS):
            collective = "the backward" if name == "_engine_run_backward" else "" if name == "wrapper" else name
        if "sclkern/" in file and not any(part in file for part in _WAITS):
            place = f"{name} ({file[file.rindex('sclkern/') :]}:{frame.f_lineno})"
            return f"{collective}, called by {place}" if collective else place, bool(collective)
        frame = frame.f_back
    return collective or "code outside of sclkern", bool(collective)
