"""The end of a run of many processes when one of them fails: the others learn of it, and end with its message."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

from sclkern.errors import UserError, WorkerError

# Seconds that the others have to save and end after a process has failed.
GRACE = 30
_FAILED = "sclkern/failed"
# How torch and gloo say that another process has gone.
_BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "gloo", "NCCL")


@dataclass(frozen=True)
class Failure:
    """What the run ends with.

    Attributes:
        rank: whose failure it is; -1 if a process has gone without a word.
        status: exit status of every process.
        message: in one line.
    """

    rank: int
    status: int
    message: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """The failure that an error is."""
        text = " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            number = int(getattr(error, "number", 2))
            return cls(rank, 128 + number, f"interrupted by {text or 'SIGINT'}")
        status = 2 if isinstance(error, (UserError, OSError)) else 3 if isinstance(error, WorkerError) else 1
        plain = isinstance(error, (UserError, WorkerError))
        return cls(rank, status, text if plain else f"{type(error).__name__}: {text}")

    def __str__(self) -> str:
        return self.message if self.rank < 0 else f"rank {self.rank}: {self.message}"


class FailureWatch(threading.Thread):
    """Ends this process when another one has failed, and the main thread hangs in a collective that it has left.

    Args:
        store: of the processes.
        rank: of this one.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        super().__init__(name="failure watch", daemon=True)
        # A connection of its own, because a call that waits holds it.
        self.store, self.rank = store.clone(), rank
        self._ended = threading.Event()

    def stop(self) -> None:
        """The main thread ends by itself."""
        self._ended.set()
        # The interpreter aborts if it ends while a thread is within a call of the store.
        self.join(timeout=10)

    def run(self) -> None:
        """Look once a second."""
        while not self._ended.wait(1.0):
            failure = first_failure(self.store)
            if failure is not None and failure.rank != self.rank:
                if not self._ended.wait(GRACE):
                    # A call in C++ that does not return leaves no other way.
                    os.write(2, f"ends, because {failure}\n".encode())
                    os._exit(failure.status)
                return


def tell(store: dist.Store, failure: Failure) -> Failure:
    """Make this the failure that the run ends with, unless there is one already.

    Args:
        store: of the processes.
        failure: of this one.

    Returns:
        The failure that the run ends with.
    """
    text = json.dumps([failure.rank, failure.status, failure.message])
    with contextlib.suppress(dist.DistError, RuntimeError):  # the process that holds the store has gone
        return Failure(*json.loads(store.compare_set(_FAILED, "", text)))
    return failure


def first_failure(store: dist.Store, seconds: float = 0.0) -> Failure | None:
    """The failure that the run ends with.

    Args:
        store: of the processes.
        seconds: how long it is waited for.

    Returns:
        The failure; None if there is none, or nobody who knows.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            if store.check([_FAILED]):
                return Failure(*json.loads(store.get(_FAILED)))
        except (dist.DistError, RuntimeError):
            return None
        if time.monotonic() >= end:
            return None
        time.sleep(0.05)


def left_alone(error: BaseException) -> bool:
    """Whether an error says that another process has left a collective."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN)
    )
