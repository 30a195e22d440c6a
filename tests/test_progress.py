"""Plain lines of progress."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from impq_core.config import RunConfig
from impq_core.hookspecs import hookimpl
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import resume, run
from impq_core.terminal import ConsoleReporter
from impq_core.testing.crew import InProcessPlugin


class Watching:
    """Keeps the progress of gradients."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    @hookimpl
    def impq_progress(self, stage: str, done: int, total: int) -> None:
        if stage == "gradients":
            self.seen.append((done, total))


def test_the_first_and_the_last_line_of_a_stage_are_printed_once() -> None:
    text = io.StringIO()
    reporter = ConsoleReporter(Console(file=text))
    for done in (0, 0, 0, 3, 9, 9, 9):
        reporter.impq_progress("evaluate", done, 9)
    reporter.impq_progress("evaluate", 10, 10)
    reporter.impq_progress("quantize", 0, 9)
    lines = [line.split(",")[0] for line in text.getvalue().splitlines()]
    assert lines == ["evaluate: 0 of 9", "evaluate: 9 of 9", "evaluate: 10 of 10", "quantize: 0 of 9"]


@pytest.mark.parametrize(("estimator", "passes", "workers"), [
    ("guided-output", 1, ""), ("guided-output", 1, "inprocess://2"), ("aumann-shapley", 2, ""), ("hawq", 2, "")])
def test_gradients_tell_how_far_they_are(tiny_config: RunConfig, variants: None, estimator: str, passes: int,
                                         workers: str) -> None:
    """From nothing to the windows of all passes, which are known from the beginning, never back; also if a resumed run
    finds them in its log."""
    config = replace(tiny_config, estimator=estimator, workers=workers, threads=1, tracking_uri="none",
                     options={"backend": tiny_config.options["backend"]})
    total = passes * config.calibration.windows

    def watched() -> tuple[Plugins, Watching]:
        plugins, watching = Plugins(), Watching()
        plugins.watch(watching)
        plugins.watch(InProcessPlugin())
        return plugins, watching

    plugins, watching = watched()
    result = run(config, plugins, only_estimate=True)
    done = [one for one, _ in watching.seen]
    assert {of for _, of in watching.seen} == {total}
    assert done[0] == 0 and done[-1] == total and done == sorted(done)
    assert workers or len(set(done)) > passes + 1  # also inside a pass
    if workers:
        plugins, watching = watched()
        resume(result.folder, plugins)
        assert watching.seen[-1] == (total, total)
