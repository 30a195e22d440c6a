"""A sweep: every combination of parts and budgets on one model, with one measurement for each estimator and backend."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator
from impq_core.files import write_text
from impq_core.keys import SweepKey
from impq_core.ledger import Ledger
from impq_core.model.source import ModelSource
from impq_core.plugins import Plugins
from impq_core.runs.folder import CHILDREN, SWEEP, RunFolder, recorded
from impq_core.runs.grid import Sweep
from impq_core.runs.pipeline import Search, allocate, keep_estimate, make_folder, result_of
from impq_core.runs.prepare import Prepared, prepare
from impq_core.runs.session import Session
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Measurements, SensitivityEstimate

MEASURED = "measured"
"""The folder of a sweep with its measurements: a folder for each backend and estimator."""


@dataclass(frozen=True, eq=False)
class _Child:
    """A run of the sweep and its name."""

    name: str
    prepared: Prepared


def run_sweep(sweep: Sweep, plugins: Plugins | None = None, path: Path | None = None, trust: Trust = NO_TRUST) -> Path:
    """Measure, plan and score all runs of a sweep. A run without a plan fails, and the others continue.

    Args:
        sweep: the configurations.
        plugins: parts and observers; the installed plugins by default.
        path: folder of a sweep to continue.
        trust: what the caller permits.

    Raises:
        ImpqError: an error that the user can correct.
    """
    plugins = plugins or Plugins()
    children = _prepare_all(sweep, plugins, trust)
    folder = RunFolder.open(path, SWEEP) if path else _make(sweep)
    key = SweepKey(tuple(child.name for child in children))
    with folder.locked(), closing(Ledger(folder.path / "finished.jsonl", "impq-sweep/2", key)) as done:
        plugins.notify("impq_sweep_started", config=sweep.base, folder=folder.path, varied=sweep.varied)
        finished = {str(row.get("run")) for row in done.rows}
        try:
            for _, group in groupby(children, key=lambda child: child.prepared.config.backend):
                runs = list(group)
                if not finished.issuperset(child.name for child in runs):
                    _one_backend(runs, plugins, folder, done, finished)
        except BaseException as error:
            plugins.notify("impq_run_failed", error=error)
            raise
        plugins.notify("impq_sweep_finished", folder=folder.path)
    return folder.path


def failed_runs(folder: Path) -> dict[str, str]:
    """The error of each run of a sweep that no plan could be made for, by the run's name."""
    runs = [RunFolder(path) for path in sorted((folder / CHILDREN).glob("*/"))]
    return {run.path.name: run.error.read_text().strip() for run in runs if run.error.is_file()}


def _make(sweep: Sweep) -> RunFolder:
    facts = {"varied": {name: list(values) for name, values in sweep.varied.items()}, "pairs": dict(sweep.pairs)}
    return RunFolder.create(Path(sweep.base.output), {"impq.toml": recorded(sweep.base).to_toml(),
                                                      SWEEP: json.dumps(facts, indent=1) + "\n"})


def _prepare_all(sweep: Sweep, plugins: Plugins, trust: Trust) -> list[_Child]:
    """Every run, checked without weights. Texts are drawn once for each estimator and backend; the weights of the model
    are checked once."""
    children: list[_Child] = []
    source: ModelSource | None = None
    for _, group in groupby(sweep.configs(plugins), key=lambda config: (config.backend, config.estimator)):
        configs = list(group)
        prepared = prepare(configs[0], plugins, trust, source=source)
        source = prepared.source
        for config in configs:
            child = prepared.planned(config, plugins)
            parts = [getattr(config, name) for name in ("backend", "estimator")]
            if child.parts.estimator.needs_surrogate:
                parts.append(config.surrogate)
            name = "-".join([*parts, config.allocator, child.config.budget])
            children.append(_Child(_file_name(name, {other.name for other in children}), child))
    return children


def _file_name(name: str, taken: Collection[str]) -> str:
    """A name without characters that file systems refuse; two names never become one."""
    short = re.sub(r"[^\w.]+", "-", name.replace("%", "percent"))
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:6]}" if short in taken else short


def _one_backend(children: list[_Child], plugins: Plugins, folder: RunFolder, done: Ledger,
                 finished: Collection[str]) -> None:
    """All runs with the variants of one backend: first every estimator measures, then every plan is scored."""
    first = children[0].prepared
    session = Session(first, plugins)
    session.quantize_for_game()
    searches: list[tuple[_Child, Search]] = []
    for estimator, group in groupby(children, key=lambda child: child.prepared.config.estimator):
        searches += _search(list(group), session, folder, f"{first.config.backend}-{estimator}", finished)
    if first.measures_another_backend:
        session.quantize_deployed()
    with closing(session.score_log(folder.path / f"scores-{first.config.backend}.jsonl")) as log:
        evaluator = session.evaluator(log)
        for child, search in searches:
            _finish(child, search, session, evaluator, folder)
            done.append({"run": child.name})
            done.sync()


def _search(children: list[_Child], session: Session, sweep: RunFolder, name: str,
            finished: Collection[str]) -> Iterator[tuple[_Child, Search]]:
    """The plans of an estimator's runs, without the finished ones. All come from one measurement, which is made for the
    median of their budgets."""
    path = sweep.path / MEASURED / name
    median = sorted(children, key=lambda child: child.prepared.budget_bytes)[len(children) // 2].prepared
    if path.exists():
        folder = RunFolder.open(path, "provenance.json")
        median.key.require(folder.read_json(folder.provenance), str(path))
    else:
        folder = make_folder(median, path.parent, path.name)
    with folder.locked(), session.with_prepared(median).playing(folder) as (game, probe):
        result = median.parts.measure(game, probe, np.random.default_rng(median.config.seed))
        measurements = result if isinstance(result, Measurements) else None
        if measurements:
            measurements.save(folder.measurements)
        fitted: dict[tuple[Any, ...], SensitivityEstimate] = {}
        for child in children:
            if child.name in finished:
                continue
            prepared = child.prepared
            key = (prepared.config.surrogate, prepared.budget_bytes) if measurements else ()
            try:
                if key not in fitted:
                    fitted[key] = result if isinstance(result, SensitivityEstimate) else prepared.parts.surrogate.fit(
                        replace(result, budget_bytes=prepared.game_budget))
                plan = allocate(prepared, fitted[key])
            except ImpqError as error:
                _fail(child, error, session.plugins, sweep)
                continue
            yield child, Search(plan, fitted[key], measurements, game.loss(plan.pick) if game else None)


def _folder_of(child: _Child, sweep: RunFolder) -> RunFolder:
    path = sweep.path / CHILDREN / child.name
    return RunFolder(path) if path.exists() else make_folder(child.prepared, path.parent, path.name)


def _start(child: _Child, plugins: Plugins, folder: RunFolder) -> None:
    prepared = child.prepared
    plugins.notify("impq_run_started", config=prepared.config, space=prepared.space, folder=folder.path,
                   coverage=prepared.coverage)


def _fail(child: _Child, error: ImpqError, plugins: Plugins, sweep: RunFolder) -> None:
    """Leave a run that failed because no plan can be made for it; the sweep continues."""
    folder = _folder_of(child, sweep)
    with folder.locked():
        _start(child, plugins, folder)
        write_text(folder.error, f"{error}\n")
        plugins.notify("impq_run_failed", error=ImpqError(f"{child.name}: {error}"))


def _finish(child: _Child, search: Search, session: Session, evaluator: Evaluator, sweep: RunFolder) -> None:
    """Score a plan, and leave a run folder like any other."""
    prepared, plugins = child.prepared, session.plugins
    assert search.plan is not None and search.estimate is not None
    folder = _folder_of(child, sweep)
    with folder.locked():
        _start(child, plugins, folder)
        try:
            session.bank.save_record(folder.variants)
            keep_estimate(plugins, folder, search.estimate, search.measurements)
            search.plan.save(folder.plan)
            plugins.notify("impq_plan_ready", plan=search.plan)
            evaluation = session.evaluate(evaluator, search.plan)
            evaluation.save(folder.evaluation)
            result = result_of(prepared, folder, search, evaluation, {})
            folder.write_cost(result)
            plugins.notify("impq_run_finished", result=result)
        except BaseException as error:
            plugins.notify("impq_run_failed", error=error)
            raise
        folder.error.unlink(missing_ok=True)
