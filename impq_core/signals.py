"""Protection of critical sections against Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay the first SIGINT and the first SIGTERM until the ``with`` block ends; a second one acts at once.

    An exception in the middle of a database session would leave the database locked, so that the run could not be
    marked as stopped. Signals reach the main thread only; in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {}
    delayed: list[tuple[int, FrameType | None]] = []

    def delay(number: int, frame: FrameType | None) -> None:
        delayed.append((number, frame))
        signal.signal(number, handlers[number])

    for number in _STOPS:
        handlers[number] = signal.getsignal(number)
        if callable(handlers[number]):
            signal.signal(number, delay)
    try:
        yield
    finally:
        for number in _STOPS:
            signal.signal(number, handlers[number])
        for delayed_number, frame in delayed:
            handlers[delayed_number](delayed_number, frame)
