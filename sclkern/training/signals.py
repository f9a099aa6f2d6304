"""SIGTERM and SIGINT as a request to stop after the step."""

from __future__ import annotations

import signal
from types import TracebackType
from typing import Any, Self


class StopSignals:
    """Records SIGTERM and SIGINT while it is entered, so that a loop can save before it stops.

    Attributes:
        requested: whether a signal has come.
    """

    requested: bool

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True
