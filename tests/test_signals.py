"""Signals are delayed in critical sections."""

from __future__ import annotations

import os
import signal

import pytest

from impq_core.signals import uninterrupted


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
