"""Seconds of a step and of its wait for data, on a fake clock."""

import pytest

from sclkern.training.clock import StepClock


def test_means_since_the_last_restart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StepClock()
    now[0] += 50  # validation, for example
    clock.restart()
    for wait in (1.0, 3.0):
        with clock.waiting():
            now[0] += wait
        now[0] += 4.0
        clock.count_step()
    assert clock.mean_seconds() == pytest.approx((6.0, 2.0))
    clock.restart()
    now[0] += 5.0
    clock.count_step()
    assert clock.mean_seconds() == pytest.approx((5.0, 0.0))
