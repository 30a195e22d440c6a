"""Ctrl-C and SIGTERM, kept out of what must not be torn."""

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
    """Let a signal to stop wait until the block is done; a second one does not wait.

    A database session that an exception leaves half-way keeps its lock, and the run could not be marked as stopped.
    Signals reach the main thread only; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        signal.signal(number, before[number])

    for number in _STOPS:
        before[number] = signal.getsignal(number)
        if callable(before[number]):
            signal.signal(number, hold)
    try:
        yield
    finally:
        for number in _STOPS:
            signal.signal(number, before[number])
        for stop, frame in held:
            before[stop](stop, frame)
