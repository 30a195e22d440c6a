"""Signals are delayed in critical sections, and a stop is never another error."""

from __future__ import annotations

import os
import signal

import pytest

from impq_core.errors import Terminated
from impq_core.signals import stoppable, uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_and_a_second_does_not(number: signal.Signals) -> None:
    def stop(*facts: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    try:
        done = []
        with pytest.raises(KeyboardInterrupt):
            with uninterrupted():
                os.kill(os.getpid(), number)
                done.append("whole")
            done.append("not reached")
        assert done == ["whole"] and signal.getsignal(number) is stop
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            done.append("not reached")
        assert done == ["whole"] and signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def _swallowed(number: signal.Signals) -> None:
    """Clear the exception of a signal and raise another, as some libraries in C do."""
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        raise ValueError("no shape") from None


@pytest.mark.parametrize(("number", "stop"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_stop_that_a_library_swallowed_is_a_stop(number: signal.Signals, stop: type[KeyboardInterrupt]) -> None:
    def handler(*facts: object) -> None:
        raise stop

    before = signal.signal(number, handler)
    try:
        with pytest.raises(stop) as raised, stoppable(), stoppable():
            _swallowed(number)
        assert type(raised.value) is stop and signal.getsignal(number) is handler
        with pytest.raises(ValueError, match="own error"), stoppable():
            raise ValueError("own error")
        with pytest.raises(stop), stoppable(), uninterrupted():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
