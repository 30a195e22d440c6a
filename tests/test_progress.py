"""Plain lines of progress."""

from __future__ import annotations

import io

from rich.console import Console

from impq_core.terminal import ConsoleReporter


def test_the_first_and_the_last_line_of_a_stage_are_printed_once() -> None:
    text = io.StringIO()
    reporter = ConsoleReporter(Console(file=text))
    for done in (0, 0, 0, 3, 9, 9, 9):
        reporter.impq_progress("evaluate", done, 9)
    reporter.impq_progress("evaluate", 10, 10)
    reporter.impq_progress("quantize", 0, 9)
    lines = [line.split(",")[0] for line in text.getvalue().splitlines()]
    assert lines == ["evaluate: 0 of 9", "evaluate: 9 of 9", "evaluate: 10 of 10", "quantize: 0 of 9"]
