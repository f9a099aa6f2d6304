"""A signal asks the loop to stop, and handlers are restored."""

import os
import signal

import pytest

from sclkern.errors import Interrupted
from sclkern.training.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_recorded_and_the_handler_restored(number):
    before = signal.getsignal(number)
    with StopSignals() as stop, stop.stage("ends the step", patience=1):
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        stop.check()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_a_stage_a_signal_stops_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped, StopSignals():
        os.kill(os.getpid(), number)
    assert stopped.value.number == number
    assert signal.getsignal(number) is before


def test_an_error_restores_the_handlers_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopSignals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before
