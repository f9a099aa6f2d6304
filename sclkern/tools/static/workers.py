"""Compilation on every core, in processes.

Threads would share one process, and neither Triton's compiler nor Python's parser is safe there: threads that parse at
the same time share a recursion count, and one of them may fail (gh-106905).
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import Any

Entry = dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """An exception of a worker: its whole text, since the exceptions of a compiler cannot always be pickled."""

    error: str


@functools.cache
def pool() -> ProcessPoolExecutor:
    """The processes for ``submit``, at most one a core, until this process ends; each imports Triton and torch once.

    Spawned, because a fork would copy the locks of torch's threads.
    """
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"))


def close() -> None:
    """End the processes of ``pool``; what was submitted and not begun is cancelled."""
    if pool.cache_info().currsize:
        pool().shutdown(wait=False, cancel_futures=True)
        pool.cache_clear()


def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """A future of ``function(*arguments)`` in a worker, or of ``Failed``; a module-level function, plain arguments."""
    return pool().submit(_caught, function, arguments)


def _caught(function: Callable[..., Any], arguments: Iterable[Any]) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return Failed(whole_text(error))


def whole_text(error: BaseException | None) -> str:
    """Every line of an exception and of those that caused it, without the stack."""
    texts = []
    while error is not None:
        texts.append("".join(traceback.format_exception_only(error)).strip())
        error = error.__cause__ or error.__context__
    return "\ncaused by: ".join(texts)


def portable(entry: Entry) -> Entry:
    """The entry with its kernel by module and name, since a compiled function cannot be pickled."""
    function = entry["kernel"].fn
    return entry | {"kernel": (function.__module__, function.__name__)}


def restored(entry: Entry) -> Entry:
    """The entry that ``portable`` was given, with this process's kernel."""
    module, name = entry["kernel"]
    return entry | {"kernel": getattr(import_module(module), name)}
