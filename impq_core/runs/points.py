"""Plans for further budgets from one measurement, each scored; and the search for the smallest within a target."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

from impq_core.config import override
from impq_core.curve import Curve, Outcome
from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator
from impq_core.plugins import Plugins
from impq_core.runs.children import Child, finish
from impq_core.runs.curves import check_wanted, earlier_answer, finished_runs, parts_of, read_curves, save_curves
from impq_core.runs.folder import MEASURED, SWEEP, RunFolder
from impq_core.runs.orders import with_workers, workers_of
from impq_core.runs.pipeline import Search, allocate
from impq_core.runs.prepare import Prepared, prepare
from impq_core.runs.session import Session, Share
from impq_core.target import STEPS, Target, next_budget
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Measurements, SensitivityEstimate


class Series:
    """Plans from one measurement. The model is loaded when the first of them is scored.

    Args:
        folder: their runs are made below it; of a run, or of a sweep.
        base: a prepared run with the parts of all plans; its budget does not matter.
        measured: losses, which are fitted for each budget, or an estimate.
        plugins: parts and observers.
        session: the model with the deployed variants, if it is loaded already.
        share: gives the workers of the session that is made otherwise; None if there are none.
    """

    def __init__(self, folder: RunFolder, base: Prepared, measured: Measurements | SensitivityEstimate,
                 plugins: Plugins, session: Session | None = None, share: Share | None = None) -> None:
        self._folder, self._base, self._measured, self._plugins = folder, base, measured, plugins
        self._given, self._share, self._stack = session, share, ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def _session(self) -> Session:
        session = self._given or Session(self._base, self._plugins, share=self._share)
        if not self._given:
            session.quantize_deployed()
        return session

    @cached_property
    def _evaluator(self) -> Evaluator:
        log = self._session.score_log(scores_of(self._folder, self._base.config.backend))
        return self._session.evaluator(self._stack.enter_context(closing(log)))

    @property
    def curve(self) -> Curve | None:
        """The plans that were scored; None if there is none yet."""
        if not any(finished_runs(self._folder)):
            return None
        parts = parts_of(self._base.config, isinstance(self._measured, Measurements))
        return next((curve for curve in read_curves(self._folder.path) if curve.parts == parts), None)

    def child(self, budget: str) -> Child:
        """The run of a budget; raises UsageError if the budget is out of reach."""
        prepared = self._base.planned(replace(self._base.config, budget=budget), self._plugins)
        child = Child.of(prepared)
        same_name = child.folder_path(self._folder)
        if same_name.is_dir() and RunFolder(same_name).read_config().budget != prepared.config.budget:
            return Child.of(prepared, {child.name})
        return child

    def measure(self, child: Child, same_size: bool = True) -> None:
        """Plan and score a run, with the references of its own size if they are wanted. Nothing is done if it is
        there."""
        if self._is_there(child, same_size):
            return
        estimate = child.estimate(self._measured)
        measurements = self._measured if isinstance(self._measured, Measurements) else None
        search = Search(allocate(child.prepared, estimate), estimate, measurements, None)
        finish(child, search, self._session.with_prepared(child.prepared), self._evaluator, self._folder, same_size)

    def _is_there(self, child: Child, same_size: bool) -> bool:
        curve = self.curve
        budget = child.prepared.budget_bytes
        rows = [point.evaluation.rows for point in curve.points if point.budget_bytes == budget] if curve else []
        return any(not same_size or any(row.kind == "random" for row in one) for one in rows)

    def seek(self, target: Target, steps: int = STEPS) -> Outcome:
        """Search the smallest plan within a target. Plans on the way are scored beside references of every size, the
        one found also beside those of its own size."""
        space, whole = self._base.space, self._base.whole
        fixed = whole.account.fixed if whole else 0
        while True:
            curve = self.curve
            tried = Outcome(target, curve).tried if curve else []
            budget = next_budget(target.limit, tried, space.low_bytes, space.high_bytes, steps)
            if budget is None:
                break
            self.measure(self.child(f"{budget + fixed}B"), same_size=False)
        assert curve is not None
        if found := Outcome(target, curve).within:
            self.measure(self.child(found.budget))
        curve = self.curve
        assert curve is not None
        return Outcome(target, curve)


def extend_curve(path: str | Path, budgets: Sequence[str] = (), target: str = "", steps: int = STEPS,
                 plugins: Plugins | None = None, trust: Trust = NO_TRUST, memory: str = "", workers: str = "",
                 threads: int = 0) -> Outcome | None:
    """Measure plans for further budgets from the estimate of a run or sweep, or search the smallest plan within a
    target. What was measured already is read. Afterwards ``curve.json`` is in the folder.

    Args:
        path: folder of a run or a sweep.
        budgets: as on the command line.
        target: such as ``nll+0.1``; without budgets.
        steps: number of bisections of the search.
        plugins: parts and observers; the installed plugins by default.
        trust: what the caller permits.
        memory: what this may take; empty for what the run's configuration says.
        workers: processes that share the work; empty for what the run's configuration says.
        threads: of the processor for each process; 0 for what the run's configuration says.

    Returns:
        The answer to the target, or to that of an earlier search.

    Raises:
        ImpqError: a budget or target is wrong or out of reach, the folder has no estimate or several, or its model,
            texts, backend, options or code have changed.
    """
    wanted = check_wanted(budgets, target, steps)
    plugins = plugins or Plugins()
    folder = RunFolder.open(path)
    source = source_of(folder)
    given = with_workers(source.read_config(), workers, threads)
    prepared = prepare(override(given, memory=memory or None), plugins, trust)
    prepared.key.require(source.read_json(source.provenance), str(source.path))
    config = prepared.config
    options = {slot: values for slot, values in config.options.items() if slot != "refiner"}
    unrefined = replace(config, refine=0, options=options)  # further plans are not refined
    if unrefined.held_back != config.held_back:  # the estimate, or the referee, has read some of these windows
        unrefined = replace(unrefined, fallback="no")
    base = replace(prepared, config=unrefined)
    measured = source.read_measurements() if source.measurements.is_file() else source.read_estimate()
    with (workers_of(base.config, plugins, trust) as share, folder.locked(),
          Series(folder, base, measured, plugins, share=share) as series):
        children = [series.child(budget) for budget in budgets]
        varied = {"target": [str(wanted)]} if wanted else {"budget": list(budgets)}
        plugins.notify("impq_sweep_started", config=base.config, folder=folder.path, varied=varied)
        with plugins.observing():
            for child in children:
                series.measure(child)
            answer = series.seek(wanted, steps) if wanted else None
        curves = read_curves(folder.path)
        answer = answer or earlier_answer(folder, curves)
        save_curves(folder, curves, answer)
        plugins.notify("impq_curve_ready", folder=folder.path, curves=curves, answer=answer)
        plugins.notify("impq_sweep_finished", folder=folder.path)
    return answer


def source_of(folder: RunFolder) -> RunFolder:
    """The folder with the estimate of a run or sweep.

    Raises:
        ImpqError: there is none, or a sweep has several.
    """
    if not (folder.path / SWEEP).is_file():
        if not folder.estimate.is_file():
            raise ImpqError(f"{folder.path} has no estimate to make plans from: it has no {folder.estimate.name}")
        return RunFolder.open(folder.path, "provenance.json")
    measured = folder.path / MEASURED
    sources = [RunFolder(path) for path in sorted(measured.iterdir())] if measured.is_dir() else []
    ready = [source for source in sources if source.measurements.is_file() or source.estimate.is_file()]
    if len(ready) != 1 or len(read_curves(folder.path)) > 1:
        raise ImpqError(f"{folder.path} has {'several curves' if ready else 'no estimate'}: further budgets are "
                        "measured for one, so give the folder of one of its runs")
    return RunFolder.open(ready[0].path, "provenance.json")


def scores_of(folder: RunFolder, backend: str) -> Path:
    """The log of held-out scores of a run, or of a backend of a sweep."""
    return folder.path / f"scores-{backend}.jsonl" if (folder.path / SWEEP).is_file() else folder.scores
