"""Many runs of one model: every combination of parts and budgets, one measurement for each estimator and backend."""

from __future__ import annotations

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
from impq_core.evaluate import Evaluator, evaluate_plan
from impq_core.files import write_text
from impq_core.interfaces import Sampler
from impq_core.ledger import Ledger, refuse_changes
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.plugins import Plugins
from impq_core.runs.folder import CHILDREN, SWEEP, RunFolder, recorded
from impq_core.runs.grid import Sweep
from impq_core.runs.pipeline import (
    Search,
    allocate,
    keep_estimate,
    load_runner,
    make_evaluator,
    make_folder,
    make_result,
    playing,
    quantize_all,
    quantize_played,
    report,
    score_log,
)
from impq_core.runs.prepare import Prepared, prepare
from impq_core.types import Measurements, SensitivityEstimate

MEASURED = "measured"
"""The folder of a sweep that holds its measurements, one for each backend and estimator."""


@dataclass(frozen=True, eq=False)
class _Child:
    """A run of the sweep, by name."""

    name: str
    prepared: Prepared


def run_sweep(sweep: Sweep, plugins: Plugins | None = None, path: Path | None = None) -> Path:
    """Measure, plan and score all runs of a sweep; a run that no plan can be made for fails, and the others continue.

    Args:
        sweep: what to do.
        plugins: who can do it, and who watches; the installed plugins by default.
        path: folder of a sweep to go on with.

    Raises:
        ImpqError: anything the user can mend.
    """
    plugins = plugins or Plugins()
    children = _prepare_all(sweep, plugins)
    folder = RunFolder.open(path, SWEEP) if path else _make(sweep)
    names = [child.name for child in children]
    with folder.locked(), closing(Ledger(folder.path / "finished.jsonl", "impq-sweep/1", {"runs": names})) as done:
        plugins.notify("impq_sweep_started", config=sweep.base, folder=folder.path, varied=sweep.varied)
        finished = {str(row.get("run")) for row in done.known}
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


def _make(sweep: Sweep) -> RunFolder:
    facts = {"varied": {name: list(values) for name, values in sweep.varied.items()}, "pairs": dict(sweep.pairs)}
    return RunFolder.create(Path(sweep.base.output), {"impq.toml": recorded(sweep.base).to_toml(),
                                                      SWEEP: json.dumps(facts, indent=1) + "\n"})


def _prepare_all(sweep: Sweep, plugins: Plugins) -> list[_Child]:
    """Every run checked as far as that goes without the weights; texts are drawn once an estimator and backend."""
    children = []
    for _, group in groupby(sweep.configs(plugins), key=lambda config: (config.backend, config.estimator)):
        configs = list(group)
        prepared = prepare(configs[0], plugins)
        for config in configs:
            child = prepared.planned(config, plugins)
            parts = [getattr(config, name) for name in ("backend", "estimator")]
            if isinstance(child.parts.estimator, Sampler):
                parts.append(config.surrogate)
            name = re.sub(r"[^\w.]+", "-", "-".join([*parts, config.allocator, child.config.budget]))
            children.append(_Child(name, child))
    return children


def _one_backend(children: list[_Child], plugins: Plugins, folder: RunFolder, done: Ledger,
                 finished: Collection[str]) -> None:
    """All runs with a backend's variants: first every estimator plays, then every plan is scored."""
    first = children[0].prepared
    apart = first.parts.estimate_with is not None
    runner = load_runner(first)
    bank = (quantize_played if apart else quantize_all)(first, runner, report(plugins, "quantize"))
    found: list[tuple[_Child, Search]] = []
    for estimator, group in groupby(children, key=lambda child: child.prepared.config.estimator):
        found += _plans(list(group), plugins, folder, f"{first.config.backend}-{estimator}", runner, bank, finished)
    bank.apply([None] * len(bank.layers))
    if apart:
        bank = quantize_all(first, runner, report(plugins, "quantize"))
    with closing(score_log(first, folder.path / f"scores-{first.config.backend}.jsonl")) as log:
        evaluator = make_evaluator(first, runner, bank, log)
        for child, search in found:
            _finish(child, search, evaluator, plugins, folder, bank)
            done.append({"run": child.name})
            done.sync()


def _plans(children: list[_Child], plugins: Plugins, sweep: RunFolder, name: str, runner: BlockwiseModel, bank: Bank,
           finished: Collection[str]) -> Iterator[tuple[_Child, Search]]:
    """The plans of an estimator's runs but the finished ones, all from one measurement, made for the middle one of
    their budgets."""
    path = sweep.path / MEASURED / name
    middle = sorted(children, key=lambda child: child.prepared.budget_bytes)[len(children) // 2].prepared
    if path.exists():
        folder = RunFolder.open(path, "provenance.json")
        refuse_changes(folder.read_json(folder.provenance), middle.provenance, str(path))
    else:
        folder = make_folder(middle, path.parent, path.name)
    with folder.locked(), playing(middle, plugins, folder, runner, bank) as (game, probe):
        found = middle.parts.measure(game, probe, np.random.default_rng(middle.config.seed))
        measurements = found if isinstance(found, Measurements) else None
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
                    fitted[key] = found if isinstance(found, SensitivityEstimate) else prepared.parts.surrogate.fit(
                        replace(found, budget_bytes=prepared.played_budget))
                plan = allocate(prepared, fitted[key])
            except ImpqError as error:
                _fail(child, error, plugins, sweep)
                continue
            yield child, Search(plan, fitted[key], measurements, game.loss(plan.pick) if game else None)


def _folder_of(child: _Child, sweep: RunFolder) -> RunFolder:
    path = sweep.path / CHILDREN / child.name
    return RunFolder(path) if path.exists() else make_folder(child.prepared, path.parent, path.name)


def _start(child: _Child, plugins: Plugins, folder: RunFolder) -> None:
    prepared = child.prepared
    plugins.notify("impq_run_started", config=prepared.config, space=prepared.space, folder=folder.path)


def _fail(child: _Child, error: ImpqError, plugins: Plugins, sweep: RunFolder) -> None:
    """Leave a run that failed because no plan can be made for it; the sweep continues."""
    folder = _folder_of(child, sweep)
    with folder.locked():
        _start(child, plugins, folder)
        write_text(folder.error, f"{error}\n")
        plugins.notify("impq_run_failed", error=ImpqError(f"{child.name}: {error}"))


def _finish(child: _Child, search: Search, evaluator: Evaluator, plugins: Plugins, sweep: RunFolder,
            bank: Bank) -> None:
    """Score a plan, and leave a run folder like that of any other run."""
    prepared, (plan, estimate) = child.prepared, (search.plan, search.estimate)
    assert plan is not None and estimate is not None
    folder = _folder_of(child, sweep)
    with folder.locked():
        _start(child, plugins, folder)
        try:
            bank.save_record(folder.variants)
            keep_estimate(plugins, folder, estimate, search.measurements)
            plan.save(folder.plan)
            plugins.notify("impq_plan_ready", plan=plan)
            evaluation = evaluate_plan(evaluator, plan, prepared.between, prepared.evaluation, prepared.config.seed,
                                       report(plugins, "evaluate"))
            evaluation.save(folder.evaluation)
            folder.write_json(folder.cost, {"forwards": estimate.forwards, "seconds": {}})
            plugins.notify("impq_run_finished",
                           result=make_result(prepared, folder, search, evaluation, estimate.forwards, {}))
        except BaseException as error:
            plugins.notify("impq_run_failed", error=error)
            raise
        folder.error.unlink(missing_ok=True)
