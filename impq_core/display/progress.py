"""Progress of runs that are started from Python: in a terminal as the command line's, in a notebook as bars."""

from __future__ import annotations

import html
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from impq_core.hookspecs import hookimpl
from impq_core.plugins import Plugins
from impq_core.results import RunResult
from impq_core.terminal import ConsoleReporter, last_lines, make_console, quiet_libraries

REFRESH_SECONDS = 0.2
"""Least time between two refreshes of the bars."""


def console(brief: bool = False, files: Iterable[str | Path] = ()) -> Plugins:
    """The installed plugins with an observer that shows progress: lines and bars in a terminal or a notebook.

    Call it before torch or transformers are imported: it silences what they print at their import.

    Args:
        brief: print one line for each finished run, as a sweep does.
        files: Python files to load as further plugins.

    Raises:
        UsageError: a file is missing or cannot be loaded.
    """
    quiet_libraries()
    plugins = Plugins(map(Path, files))
    if in_notebook():
        warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm, whose bars are off
        plugins.watch(NotebookReporter(brief))
    else:
        plugins.watch(ConsoleReporter(make_console(), brief))
    return plugins


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")  # type: ignore[no-untyped-call,unused-ignore]


class NotebookReporter(ConsoleReporter):
    """Observer that prints lines in a notebook, and shows a bar for each stage in one place, which it updates.

    Args:
        brief: print one line for each finished run.
    """

    def __init__(self, brief: bool = False) -> None:
        # Not as rich's HTML: text goes with the page's colours, and into files that are run without a page.
        super().__init__(Console(file=sys.stdout, force_jupyter=False, force_terminal=False, width=130), brief)
        self._shown: Any = None
        self._stages: dict[str, tuple[int, int, float]] = {}  # done, of how many, since when
        self._refreshed = 0.0

    @hookimpl
    def impq_progress(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage."""
        before = self._stages.get(stage)
        started = time.monotonic() if before is None or done < before[0] else before[2]
        self._stages[stage] = (done, total, started)
        if before is None or done >= total or time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self._refresh()

    @hookimpl
    def impq_run_finished(self, result: RunResult) -> None:
        """Print the last lines: the result of the cell shows the rest."""
        if self._brief:
            super().impq_run_finished(result)
            return
        self._stop()
        for line in last_lines(result):
            self._say(line)

    def _stop(self) -> None:
        if self._stages:
            self._refresh()
        self._shown, self._stages = None, {}

    def _refresh(self) -> None:
        from IPython.display import HTML, display

        self._refreshed = time.monotonic()
        rows = "".join(f'<div><progress value="{done}" max="{max(total, 1)}"></progress> {html.escape(stage)}: '
                       f"{done} of {total}, {self._refreshed - started:.0f} s</div>"
                       for stage, (done, total, started) in self._stages.items())
        page = HTML(f'<div class="impq-progress">{rows}</div>')  # type: ignore[no-untyped-call,unused-ignore]
        if self._shown is None:
            self._shown = display(page, display_id=True)  # type: ignore[no-untyped-call,unused-ignore]
        else:
            self._shown.update(page)
