"""Time of the training steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepClock:
    """Mean time of the steps since the last restart, and the part of it that waited for data.

    Steps are timed from one logged step to the next: a GPU still works on the steps in between when they return.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start to count anew, without what lay between the last step and now."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count_step(self) -> None:
        """Count a step that has been taken."""
        self._steps += 1

    @property
    def steps(self) -> int:
        """Steps since the last restart."""
        return self._steps

    def mean_seconds(self) -> tuple[float, float]:
        """Seconds of a step, and seconds of it that waited for data."""
        return (time.perf_counter() - self._start) / self._steps, self._waited / self._steps
