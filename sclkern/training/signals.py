"""SIGTERM, SIGINT and SIGHUP as requests to stop where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from sclkern.errors import Interrupted


@dataclass(frozen=True)
class _Stage:
    """What a process does now.

    Attributes:
        awaited: what the first signal says.
        patience: signals that do not stop it; None is stopped by no signal.
        anywhere: whether a signal stops it at once; else it stops where it calls ``check``.
    """

    awaited: str
    patience: int | None
    anywhere: bool


class StopSignals:
    """Counts signals while it is entered, says at once what is awaited, and stops a stage that need not be ended.

    It may be entered again within itself. In another thread than the main one, where Python takes no handlers, it
    counts nothing.

    Attributes:
        alone: whether this process may stop by itself; of many that train together, none leaves what all take part in.
        quiet: whether signals are not answered by a line.
        checked: called wherever the run passes a place at which it may stop: it is alive.
        count: signals that have come.
        number: the first of them; None before.
    """

    alone: bool
    quiet: bool
    checked: Callable[[], object]
    count: int
    number: signal.Signals | None

    def __init__(self) -> None:
        self.checked = lambda: None
        self.alone = True
        self.quiet = False
        self.count = 0
        self.number = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._depth = 0
        self._stage = _Stage("stops now", patience=0, anywhere=True)

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._receive) for number in _taken()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._handlers = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.count > 0

    def request(self) -> None:
        """Stop as after a first signal."""
        self.count = max(self.count, 1)

    @contextmanager
    def stage(self, awaited: str, *, patience: int | None, anywhere: bool = False) -> Iterator[None]:
        """Say what this block does, and which signal stops it.

        Args:
            awaited: what the line of the first signal says.
            patience: signals that do not stop the block; None lets none stop it.
            anywhere: whether the block may be left wherever it is; else where it calls ``check``.
        """
        if not self.alone:
            awaited, patience = awaited.partition("; a second signal")[0], None
        before, self._stage = self._stage, _Stage(awaited, patience, anywhere)
        try:
            yield
        finally:
            self._stage = before

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block within a stage that may be left wherever it is, as soon as the signals suffice."""
        self.check()
        with self.stage(self._stage.awaited, patience=self._stage.patience, anywhere=True):
            yield

    def check(self) -> None:
        """Stop here if more signals have come than the stage has patience for.

        Raises:
            Interrupted: they have.
        """
        self.checked()
        patience = self._stage.patience
        if self.number is not None and patience is not None and self.count > patience:
            raise Interrupted(self.number)

    def _receive(self, number: int, _frame: object) -> None:
        self.count += 1
        self.number = self.number or signal.Signals(number)
        stage = self._stage
        stops = stage.patience is not None and self.count > stage.patience
        text = "stops without waiting" if stops and self.count > 1 else stage.awaited
        if not self.quiet:
            _tell(f"{signal.Signals(number).name}: {text}")
        if stops and stage.anywhere:
            raise Interrupted(self.number)


def _taken() -> list[signal.Signals]:
    """The signals that are taken; ``nohup`` has made the process ignore SIGHUP."""
    taken = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        taken.append(signal.SIGHUP)
    return taken


def _tell(text: str) -> None:
    """Write a line to stderr, below the progress bar; not by Python's stream, which the signal may have interrupted."""
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(2, f"\n{text}\n".encode())
