"""Processes that decode: they leave signals to the process that trains; the death of one is an error of one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

from torch.utils.data import DataLoader

from sclkern.errors import WorkerError

# A scheduler sends these to every process of a job, a terminal to its whole group.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_LIKELY_CAUSE = {
    "SIGKILL": ", as the kernel does when memory runs out",
    "SIGBUS": ", perhaps because /dev/shm is full, or a file of the data was cut short",
}


def ignore_signals(worker: int) -> None:
    """Leave signals to the parent, which ends its workers; a ``worker_init_fn`` of ``DataLoader``.

    Args:
        worker: number of the worker.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def iterate(loader: DataLoader[Any]) -> Generator[Any]:
    """Iterate over a loader, and end its workers at the end, also when the generator is closed early.

    Args:
        loader: its ``worker_init_fn`` is ``ignore_signals``.

    Returns:
        What the loader gives.

    Raises:
        WorkerError: a worker has died.
    """
    iterator: Iterator[Any] | None = None
    try:
        with _left_alone():
            iterator = iter(loader)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        if problem := _death(iterator):
            raise WorkerError(problem) from error
        raise
    finally:
        _end(iterator)


@contextmanager
def _left_alone() -> Iterator[None]:
    """Start processes that get no signal before they ignore it, and without torch's handler of dead children.

    That handler raises in the midst of whatever the process does, such as an update of the weights; ``DataLoader`` also
    finds a dead worker when it waits for a batch.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if in_main and hasattr(signal, "SIGCHLD") else None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS) if hasattr(signal, "pthread_sigmask") else set()
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if before is not None:
            signal.signal(signal.SIGCHLD, before)


def _death(iterator: Iterator[Any] | None) -> str | None:
    """What happened to the first worker that is no longer there; None if all are."""
    workers = getattr(iterator, "_workers", ())
    # A killed process closes its connections a moment before it is gone.
    ended = connection.wait([worker.sentinel for worker in workers], timeout=1) if workers else []
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()
        if not worker.is_alive():
            if worker.exitcode is None or worker.exitcode >= 0:
                return f"a data worker (process {worker.pid}) ended with status {worker.exitcode}"
            name = signal.Signals(-worker.exitcode).name
            return f"a data worker (process {worker.pid}) was killed by {name}{_LIKELY_CAUSE.get(name, '')}"
    return None


def _end(iterator: Iterator[Any] | None) -> None:
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
    for worker in getattr(iterator, "_workers", ()):
        if worker.is_alive():  # it hangs, and ignores the signal that torch sends
            worker.kill()
            worker.join()
