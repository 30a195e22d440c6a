"""The progress of gradient passes over the windows of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Passes:
    """Counts the windows that passes have read.

    Args:
        report: called with the number of windows read so far and that of all passes; a window counts once for each
            pass.
        expected: number of windows of all passes, as far as it is known.
    """

    def __init__(self, report: Callable[[int, int], None] = lambda done, total: None, expected: int = 0) -> None:
        self._report, self._expected = report, expected
        self._before, self._reached, self._windows = 0, 0.0, 0

    @contextmanager
    def over(self, windows: int) -> Iterator[None]:
        """The context of a pass over a number of windows."""
        self._reached, self._windows = 0.0, windows
        self._say()
        yield
        self._before, self._reached, self._windows = self._before + windows, 0.0, 0
        self._say()

    def reach(self, windows: float) -> None:
        """Report how far the pass has come, in windows; what is behind that is left out, and all outside of a pass."""
        if int(self._reached) < int(min(windows, self._windows)):
            self._reached = min(windows, self._windows)
            self._say()

    def _say(self) -> None:
        self._report(self._before + int(self._reached), max(self._expected, self._before + self._windows))
