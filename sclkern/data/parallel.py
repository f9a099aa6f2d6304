"""One function on many items, in a process on each core, with a progress bar."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from typing import Any, TypeVar

from tqdm import tqdm

from sclkern.errors import WorkerError

_T = TypeVar("_T")
_R = TypeVar("_R")
# Jobs that wait for each process, so that none is idle and few results wait for their turn.
_AHEAD = 8


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[_T], _R],
    items: Iterable[_T],
    *,
    workers: int,
    description: str,
    unit: str,
    total: int | None = None,
    size: Callable[[_T], int] = lambda item: 1,
) -> Iterator[_R]:
    """Call a function on every item; results come in the order of the items.

    Args:
        function: any callable, which processes inherit, so it may hold a source of data; it must not use a GPU.
        items: plain data, which is sent to the processes.
        workers: processes; 1 and less work in this process.
        description: of the progress bar, which is shown on a terminal.
        unit: what the bar counts.
        total: length of the bar.
        size: how far the bar moves for an item.

    Yields:
        What the function returns. An exception of it is raised in its turn, and what has not begun is cancelled.

    Raises:
        WorkerError: a process has died.
    """
    items = iter(items)
    with tqdm(total=total, unit=unit, desc=description, dynamic_ncols=True, disable=None, leave=False) as bar:
        if workers <= 1:
            for item in items:
                yield function(item)
                bar.update(size(item))
            return
        pool = _pool(workers, function)
        try:
            waiting: list[tuple[_T, Future[Any]]] = []
            while True:
                for item in islice(items, workers * _AHEAD - len(waiting)):
                    waiting.append((item, pool.submit(_call, item)))
                if not waiting:
                    return
                item, future = waiting.pop(0)
                result = future.result()
                bar.update(size(item))
                yield result
        except BrokenProcessPool as error:
            raise WorkerError(
                f"a process of {description} died, as the kernel ends one when memory runs out; use fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _pool(workers: int, function: Callable[[Any], Any]) -> ProcessPoolExecutor | ThreadPoolExecutor:
    """Processes; forked, as a user's script may not be fit for import by another process, and to share the function."""
    if "fork" in get_all_start_methods():
        return ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin, initargs=(function, True))
    return ThreadPoolExecutor(workers, initializer=_begin, initargs=(function, False))


_function: Callable[[Any], Any]


def _begin(function: Callable[[Any], Any], is_process: bool) -> None:
    global _function
    _function = function
    if is_process:
        # The parent ends its processes; a traceback of each would hide its message.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(item: Any) -> Any:
    return _function(item)
