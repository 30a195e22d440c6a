"""A sweep: every combination of parts and budgets on one model, with one measurement for each estimator and backend."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.costs import Metering
from impq_core.curve import Outcome
from impq_core.errors import ImpqError
from impq_core.evaluate import allocations_of
from impq_core.interfaces import Game
from impq_core.keys import SweepKey
from impq_core.ledger import Ledger
from impq_core.model.source import ModelSource
from impq_core.plugins import Plugins
from impq_core.runs.children import Child, fail, finish
from impq_core.runs.curves import earlier_answer, finished_runs, read_curves, save_curves
from impq_core.runs.folder import CHILDREN, MEASURED, SWEEP, RunFolder, recorded
from impq_core.runs.grid import Sweep
from impq_core.runs.orders import workers_of
from impq_core.runs.pipeline import Search, allocate, make_folder
from impq_core.runs.points import Series, scores_of
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session, Share
from impq_core.target import Target
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Measurements, SensitivityEstimate

TARGET = "target"
"""Stands in ``finished.jsonl`` for the search for a target."""


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
    children = _prepare_all(sweep, plugins, trust, path)
    target = Target.parse(sweep.target) if sweep.target else None
    key = SweepKey((*(child.name for child in children), *([f"{target}, {sweep.steps} steps"] if target else [])))
    with workers_of(children[0].prepared.config, plugins, trust) as share:
        folder = RunFolder.open(path, SWEEP) if path else _make(sweep)
        with folder.locked(), closing(Ledger(folder.path / "finished.jsonl", "impq-sweep/2", key)) as done:
            plugins.notify("impq_sweep_started", config=sweep.base, folder=folder.path, varied=_told(sweep))
            with plugins.observing():
                _all_runs(sweep, children, plugins, folder, target, done, share)
            if sweep.is_curve and any(finished_runs(folder)):
                [curve] = curves = read_curves(folder.path)
                answer = Outcome(target, curve) if target else earlier_answer(folder, curves)
                save_curves(folder, curves, answer)
                plugins.notify("impq_curve_ready", folder=folder.path, curves=curves, answer=answer)
            plugins.notify("impq_sweep_finished", folder=folder.path)
    return folder.path


def _all_runs(sweep: Sweep, children: Sequence[Child], plugins: Plugins, folder: RunFolder, target: Target | None,
              done: Ledger, share: Share | None) -> None:
    """Every run that is not finished."""
    finished = {str(row.get("run")) for row in done.rows}
    if target and TARGET not in finished:
        _target(children[0], plugins, folder, target, sweep.steps, share)
        done.append({"run": TARGET})
    for _, group in groupby([] if target else children, key=lambda child: child.prepared.config.backend):
        runs = list(group)
        if not finished.issuperset(child.name for child in runs):
            _one_backend(runs, plugins, folder, done, finished, share)


def _told(sweep: Sweep) -> dict[str, Sequence[str]]:
    """The settings of a sweep that observers are told."""
    return {**sweep.varied, **({"target": [sweep.target]} if sweep.target else {})}


def failed_runs(folder: Path) -> dict[str, str]:
    """The error of each run of a sweep that no plan could be made for, by the run's name."""
    runs = [RunFolder(path) for path in sorted((folder / CHILDREN).glob("*/"))]
    return {run.path.name: run.error.read_text().strip() for run in runs if run.error.is_file()}


def _make(sweep: Sweep) -> RunFolder:
    facts = {"varied": {name: list(values) for name, values in sweep.varied.items()}, "pairs": dict(sweep.pairs),
             **({"target": sweep.target, "steps": sweep.steps} if sweep.target else {})}
    return RunFolder.create(Path(sweep.base.output), {"impq.toml": recorded(sweep.base).to_toml(),
                                                      SWEEP: json.dumps(facts, indent=1) + "\n"})


def _prepare_all(sweep: Sweep, plugins: Plugins, trust: Trust, path: Path | None) -> list[Child]:
    """Every run, checked without weights. Texts are drawn once for each estimator and backend; the weights of the model
    are checked once, and meters are read once for each backend: all runs of a sweep have the same layers."""
    children: list[Child] = []
    source: ModelSource | None = None
    meterings: dict[str, tuple[Metering, ...] | None] = {}
    for _, group in groupby(sweep.configs(plugins), key=lambda config: (config.backend, config.estimator)):
        configs = list(group)
        backend = configs[0].backend
        if path and backend not in meterings:
            kept = next(iter(sorted((path / MEASURED).glob(f"{backend}-*/costs.json"))), None)
            meterings[backend] = RunFolder(kept.parent).read_meterings() if kept else None
        prepared = prepare(configs[0], plugins, trust, source=source, meterings=meterings.get(backend))
        source, meterings[backend] = prepared.source, prepared.meterings
        for config in configs:
            children.append(Child.of(prepared.planned(config, plugins), {other.name for other in children}))
    return children


def _one_backend(children: list[Child], plugins: Plugins, folder: RunFolder, done: Ledger,
                 finished: Collection[str], share: Share | None) -> None:
    """All runs with the variants of one backend: first every estimator measures, then every plan is scored."""
    first = children[0].prepared
    session = Session(first, plugins, share=share)
    session.quantize_for_game()
    searches: list[tuple[Child, Search]] = []
    for _, group in groupby(children, key=lambda child: child.prepared.config.estimator):
        searches += _search(list(group), session, folder, finished)
    if first.measures_another_backend:
        session.quantize_deployed()
    with closing(session.score_log(scores_of(folder, first.config.backend))) as log:
        evaluator = session.evaluator(log)
        if share:  # the plans and references of all runs at once
            evaluator.scores_of_texts([assignment for _, search in searches if search.plan for *_, assignment in
                                       allocations_of(search.plan, first.between, first.config.seed)])
        for child, search in searches:
            finish(child, search, session, evaluator, folder)
            done.append({"run": child.name})
            done.sync()


def _target(child: Child, plugins: Plugins, folder: RunFolder, target: Target, steps: int,
            share: Share | None) -> None:
    """Measure once, then the plans of the search for a target."""
    prepared = child.prepared
    session = Session(prepared, plugins, share=share)
    session.quantize_for_game()
    with _measured([child], session, folder) as (measured, _):
        pass
    session.quantize_deployed()
    with Series(folder, prepared, measured, plugins, session) as series:
        series.seek(target, steps)


@contextmanager
def _measured(children: list[Child], session: Session,
              sweep: RunFolder) -> Iterator[tuple[Measurements | SensitivityEstimate, Game | None]]:
    """The measurement of an estimator for the median of its runs' budgets, and its game."""
    median = sorted(children, key=lambda child: child.prepared.budget_bytes)[len(children) // 2].prepared
    path = sweep.path / MEASURED / f"{median.config.backend}-{median.config.estimator}"
    if path.exists():
        folder = RunFolder.open(path, "provenance.json")
        median.key.require(folder.read_json(folder.provenance), str(path))
    else:
        folder = make_folder(median, path.parent, path.name)
    with folder.locked(), session.with_prepared(median).playing(folder) as (game, probe):
        measured = median.parts.measure(game, probe, np.random.default_rng(median.config.seed), median.costs)
        measured.save(folder.measurements if isinstance(measured, Measurements) else folder.estimate)
        yield measured, game


def _search(children: list[Child], session: Session, sweep: RunFolder,
            finished: Collection[str]) -> Iterator[tuple[Child, Search]]:
    """The plans of an estimator's runs, without the finished ones."""
    with _measured(children, session, sweep) as (measured, game):
        measurements = measured if isinstance(measured, Measurements) else None
        fitted: dict[tuple[Any, ...], SensitivityEstimate] = {}
        for child in children:
            if child.name in finished:
                continue
            prepared = child.prepared
            key = (prepared.config.surrogate, prepared.budget_bytes) if measurements else ()
            try:
                if key not in fitted:
                    fitted[key] = child.estimate(measured)
                plan = allocate(prepared, fitted[key])
            except ImpqError as error:
                fail(child, error, session.plugins, sweep)
                continue
            yield child, Search(plan, fitted[key], measurements, game.loss(plan.pick) if game else None)
