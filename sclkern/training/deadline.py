"""The time before which a run must be saved and have ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime

from sclkern.errors import UserError


class Deadline:
    """Tells when no further step fits.

    Args:
        end: seconds since the epoch; None is never.
        now: gives the same; for tests.
    """

    def __init__(self, end: float | None, now: Callable[[], float] = time.time) -> None:
        self.end = end
        self._now = now
        self._before: float | None = None

    def is_near(self, saving_seconds: float) -> bool:
        """Whether the step that begins should be the last; called at the start of each.

        Args:
            saving_seconds: the longest time that a checkpoint took so far.

        Returns:
            Whether this step and a next one, each as long as the one before, and a checkpoint would end too late.
        """
        if self.end is None:
            return False
        now = self._now()
        step = 0.0 if self._before is None else now - self._before
        self._before = now
        return now + 2 * (step + saving_seconds) >= self.end


def deadline_of(stop_before: int | str | None) -> Deadline:
    """Read ``run.stop_before``.

    Args:
        stop_before: a local time, or seconds before the end of the job of SLURM.

    Returns:
        The deadline.

    Raises:
        UserError: a time that is past, or seconds outside of a job of SLURM that has an end.
    """
    if stop_before is None:
        return Deadline(None)
    if isinstance(stop_before, str):
        end = datetime.fromisoformat(stop_before).timestamp()
    elif (job_end := os.environ.get("SLURM_JOB_END_TIME", "")).isdecimal():
        end = int(job_end) - stop_before
    else:
        raise UserError(
            f"run.stop_before: got {stop_before} seconds before the end of a job, but SLURM_JOB_END_TIME is not set; "
            "give a local time, such as 'run.stop_before=2026-12-31 08:00'"
        )
    if end <= time.time():
        past = datetime.fromtimestamp(end).isoformat(" ", "seconds")
        raise UserError(f"run.stop_before: got {stop_before!r}, or {past}, which is past; give a later time, or null")
    return Deadline(end)
