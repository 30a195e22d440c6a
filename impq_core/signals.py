"""Ctrl-C and SIGTERM: delayed in critical sections, and never taken for another error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STOPS = (signal.SIGINT, signal.SIGTERM)


def _handlers() -> dict[int, Callable[[int, FrameType | None], Any]]:
    """The functions that handle the signals; an ignored signal has none. Signals reach the main thread only: in another
    thread there are none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in _STOPS}
    return {number: handler for number, handler in found.items() if callable(handler)}


@contextmanager
def stoppable() -> Iterator[None]:
    """End the ``with`` block as a stop if a SIGINT or SIGTERM arrived in it and an error of another kind came out.

    Python raises KeyboardInterrupt in whatever runs at that moment. Libraries in C that call Python can clear it and
    raise an error of their own (safetensors does: that a tensor has no shape), which would be reported as a damaged
    file and as a run that failed.

    Raises:
        KeyboardInterrupt: what the handler of the signal raises; its cause is the error that came out of the block.
    """
    handlers = _handlers()
    arrived: list[tuple[int, FrameType | None]] = []

    def remember(number: int, frame: FrameType | None) -> None:
        arrived.append((number, frame))
        handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, remember)
    try:
        yield
    except Exception as error:
        for number, frame in arrived:
            try:
                handlers[number](number, frame)
            except KeyboardInterrupt as stop:
                raise stop from error
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay the first SIGINT and the first SIGTERM until the ``with`` block ends; a second one acts at once.

    An exception in the middle of a database session would leave the database locked, so that the run could not be
    marked as stopped. Signals reach the main thread only; in another thread this does nothing.
    """
    handlers = _handlers()
    delayed: list[tuple[int, FrameType | None]] = []

    def delay(number: int, frame: FrameType | None) -> None:
        delayed.append((number, frame))
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, delay)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for delayed_number, frame in delayed:
            handlers[delayed_number](delayed_number, frame)
