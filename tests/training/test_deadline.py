"""A run that must end before a time ends while a step and a checkpoint still fit."""

import time
from datetime import datetime, timedelta

import pytest

from sclkern.errors import UserError
from sclkern.training.config import load_config
from sclkern.training.deadline import Deadline, deadline_of


def test_the_last_step_is_the_one_after_which_none_fits():
    now = [0.0]
    deadline = Deadline(100.0, lambda: now[0])
    near = []
    for now[0] in (0.0, 10.0, 20.0, 60.0, 70.0, 75.0):
        near.append(deadline.is_near(2.0))
    # Steps of 10 s, then one of 40 s: 60 + 2 * (40 + 2) is over; so is 75 + 2 * (5 + 12) with a slower disk.
    assert near == [False, False, False, True, False, False]
    now[0] = 80.0
    assert deadline.is_near(12.0)
    assert not Deadline(None).is_near(1e9)


def test_times_are_local_and_seconds_are_of_the_job(monkeypatch):
    later = (datetime.now() + timedelta(hours=1)).replace(microsecond=0)
    for text in (str(later), later.isoformat(), later.astimezone().isoformat()):
        assert deadline_of(text).end == later.timestamp()
    end = int(time.time()) + 3600
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    assert deadline_of(300).end == end - 300
    assert deadline_of(None).end is None


def test_what_cannot_be_kept_is_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    with pytest.raises(UserError, match=r"stop_before: got 300 seconds .* but SLURM_JOB_END_TIME is not set; give a l"):
        deadline_of(300)
    with pytest.raises(UserError, match=r"got '2020-01-01 08:00', or 2020-01-01 08:00:00, which is past; give a later"):
        deadline_of("2020-01-01 08:00")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    with pytest.raises(UserError, match=r"which is past"):
        deadline_of(300)


@pytest.mark.parametrize("value", ["8 o'clock", "-1", "12:30"])
def test_what_is_no_time_is_refused(value):
    with pytest.raises(UserError, match=r"run\.stop_before: got .*, expected a local time such as"):
        load_config(None, [f"run.stop_before={value}"])


def test_both_kinds_are_read():
    assert load_config(None, ["run.stop_before=300"]).run.stop_before == 300
    assert load_config(None, ["run.stop_before=2026-12-31 08:00"]).run.stop_before == "2026-12-31 08:00"
