"""One run: the order of its stages, which no other module knows."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from impq_core.config import RunConfig, override
from impq_core.files import write_text
from impq_core.game.model_game import ModelGame
from impq_core.ledger import MeasurementLog
from impq_core.plugins import Plugins
from impq_core.results import Evaluation, RunResult
from impq_core.runs.fallback import against_uniform
from impq_core.runs.folder import RunFolder, recorded
from impq_core.runs.metering import to_data
from impq_core.runs.orders import with_workers, workers_of
from impq_core.runs.prepare import Prepared, prepare
from impq_core.runs.session import Session, Share
from impq_core.signals import stoppable
from impq_core.trust import NO_TRUST, Trust
from impq_core.types import Measurements, Plan, SensitivityEstimate
from impq_core.uniform_test import UniformTest

REFINE_STREAM = (2**32 - 1,)
"""Follows the run's seed in the seed of the refiner's draws; random reference plans are numbered from 0."""


def run(config: RunConfig, plugins: Plugins | None = None, only_estimate: bool = False,
        trust: Trust = NO_TRUST) -> RunResult:
    """Estimate, allocate, quantize and evaluate as configured.

    Args:
        config: the configuration.
        plugins: parts and observers; the installed plugins by default.
        only_estimate: stop after the estimate; ``resume`` continues.
        trust: what the caller permits.

    Raises:
        ImpqError: an error that the user can correct.
    """
    plugins = plugins or Plugins()
    prepared = prepare(config, plugins, trust)
    with workers_of(prepared.config, plugins, trust) as share:
        folder = make_folder(prepared)
        with folder.locked():
            try:
                _start(prepared, plugins, folder)
            except BaseException:
                shutil.rmtree(folder.path)
                with suppress(OSError):  # not empty: the parent was there before, or other runs use it
                    folder.path.parent.rmdir()
                raise
            return _observed(prepared, plugins, folder, only_estimate, share)


def resume(path: str | Path, plugins: Plugins | None = None, trust: Trust = NO_TRUST, memory: str = "",
           workers: str = "") -> RunResult:
    """Continue a run that ended early; a finished run returns its result again.

    Rows in the run's logs are not measured again, and variants in the cache are not made again. Estimate and plan are
    bit for bit those of an uninterrupted run on the same machine.

    Args:
        path: the run's folder.
        plugins: parts and observers; the installed plugins by default.
        trust: what the caller permits.
        memory: what the run may take from now on; empty for what its configuration says.
        workers: processes that share the work from now on; empty for what its configuration says.

    Raises:
        ImpqError: the folder holds no run, another process works in it, or its model, texts, backend, options or code
            have changed.
    """
    plugins = plugins or Plugins()
    folder = RunFolder.open(path, "provenance.json")
    config = with_workers(override(folder.read_config(), memory=memory or None), workers)
    prepared = prepare(config, plugins, trust, meterings=folder.read_meterings())
    prepared.key.require(folder.read_json(folder.provenance), str(path))
    with folder.locked(), workers_of(prepared.config, plugins, trust) as share:
        _start(prepared, plugins, folder)
        result = _observed(prepared, plugins, folder, only_estimate=False, share=share)
        folder.error.unlink(missing_ok=True)
        return result


def play(config: RunConfig, plugins: Plugins | None = None, trust: Trust = NO_TRUST) -> ModelGame:
    """The game of a configuration's model, for a script to play: the model is loaded and quantized at every width, no
    folder is made, and nothing is logged.

    Args:
        config: the configuration; its estimator must be one that reads text.
        plugins: parts; the installed plugins by default.
        trust: what the caller permits.

    Raises:
        ImpqError: an error that the user can correct.
    """
    plugins = plugins or Plugins()
    prepared = prepare(config, plugins, trust)
    prepared.require_text()
    session = Session(prepared, plugins)
    session.quantize_for_game()
    return session.game()


def make_folder(prepared: Prepared, parent: Path | None = None, name: str = "") -> RunFolder:
    """A new folder with the files that a run is resumed from."""
    file = {"file": asdict(prepared.whole.account)} if prepared.whole else {}
    costs = {"costs.json": json.dumps(to_data(prepared.meterings), indent=1) + "\n"} if prepared.meterings else {}
    return RunFolder.create(parent or Path(prepared.config.output), {
        **costs,
        "impq.toml": recorded(prepared.config).to_toml(),
        "provenance.json": json.dumps(prepared.key.to_dict(), indent=1) + "\n",
        "space.json": json.dumps({**prepared.space.to_dict(), **file}, indent=1) + "\n"}, name)


def _start(prepared: Prepared, plugins: Plugins, folder: RunFolder) -> None:
    with plugins.observing():
        plugins.notify("impq_run_started", config=prepared.config, space=prepared.space, folder=folder.path,
                       coverage=prepared.coverage)


def _observed(prepared: Prepared, plugins: Plugins, folder: RunFolder, only_estimate: bool,
              share: Share | None) -> RunResult:
    with plugins.observing(), _error_kept(folder):
        result = _stages(Session(prepared, plugins, share=share), folder, only_estimate)
    plugins.notify("impq_run_finished", result=result)
    return result


@contextmanager
def _error_kept(folder: RunFolder) -> Iterator[None]:
    try:
        with stoppable():
            yield
    except BaseException as error:
        with suppress(OSError):  # a full disk may be the error
            write_text(folder.error, "".join(traceback.format_exception(error)))
        raise


@dataclass(frozen=True, eq=False)
class Search:
    """The result of estimating, allocating and refining.

    Args:
        plan: None if only an estimate was asked for.
        estimate: None if the plan was given.
        measurements: the losses that the surrogate fitted, if it fitted any.
        measured_loss: the plan's loss in the game, nats per token above the reference; None without a game.
        refine_forwards: full-model forwards that the refiner spent.
        uniform_test: the plan against the uniform model of its budget; None if it was not tested.
        estimated: the estimated plan, if the uniform model took its place.
    """

    plan: Plan | None
    estimate: SensitivityEstimate | None
    measurements: Measurements | None
    measured_loss: float | None
    refine_forwards: float = 0.0
    uniform_test: UniformTest | None = None
    estimated: Plan | None = None

    @property
    def forwards(self) -> float:
        """Full-model forwards of the search."""
        return self.refine_forwards + (self.estimate.forwards if self.estimate else 0.0)


def _stages(session: Session, folder: RunFolder, only_estimate: bool) -> RunResult:
    prepared = session.prepared
    session.quantize_for_game()
    if not prepared.measures_another_backend:
        _variants_ready(session, folder)
    search, evaluation = _search(session, folder, only_estimate), None
    if not only_estimate:
        if prepared.measures_another_backend:
            session.quantize_deployed()
            _variants_ready(session, folder)
        if prepared.parts.refiner:
            with session.clock.stage("refine"):
                search = _refine(session, folder, search)
        search = tested(session, folder, search)
        with session.clock.stage("evaluate"), closing(session.score_log(folder.scores)) as log:
            assert search.plan is not None
            evaluation = session.evaluate(session.evaluator(log), search.plan, estimated=search.estimated)
            evaluation.save(folder.evaluation)
    result = result_of(prepared, folder, search, evaluation, session.clock.seconds)
    folder.write_cost(result)
    return result


def _variants_ready(session: Session, folder: RunFolder) -> None:
    session.bank.save_record(folder.variants)
    session.plugins.notify("impq_variants_ready", nbytes=session.bank.nbytes, seconds=session.clock.seconds["quantize"])


def _search(session: Session, folder: RunFolder, only_estimate: bool) -> Search:
    """Estimate on the played variants and allocate; a plan that was given is only measured."""
    prepared, plugins = session.prepared, session.plugins
    with session.playing(folder) as (game, probe):
        plan, estimate, measurements = prepared.plan, None, None
        if plan is None:
            with session.clock.stage("estimate"):
                rng = np.random.default_rng(prepared.config.seed)
                estimate, measurements = prepared.parts.estimate(game, probe, rng, prepared.costs)
                keep_estimate(plugins, folder, estimate, measurements)
            if only_estimate:
                return Search(None, estimate, measurements, None)
            with session.clock.stage("allocate"):
                plan = allocate(prepared, estimate)
        plan.save(folder.searched_plan)
        plugins.notify("impq_plan_ready", plan=plan)
        return Search(plan, estimate, measurements, game.loss(plan.pick) if game else None)


def keep_estimate(plugins: Plugins, folder: RunFolder, estimate: SensitivityEstimate,
                  measurements: Measurements | None) -> None:
    """Write an estimate and the measurements that it was fitted to, and notify observers."""
    if measurements is not None:
        measurements.save(folder.measurements)
    estimate.save(folder.estimate)
    plugins.notify("impq_estimate_ready", estimate=estimate, measurements=measurements)


def allocate(prepared: Prepared, estimate: SensitivityEstimate) -> Plan:
    """The plan of a run's allocator, with its provenance."""
    plan = prepared.parts.plan(estimate.on(prepared.space), prepared.budget_bytes, prepared.costs)
    return replace(plan, is_loss=estimate.is_loss, provenance={**prepared.key.to_dict(), "estimate": estimate.method},
                   file_bytes=prepared.promise(plan))


def _refine(session: Session, folder: RunFolder, search: Search) -> Search:
    """A better plan near the plan of the search; the referee's windows are not the game's."""
    prepared, config, plan = session.prepared, session.prepared.config, search.plan
    assert prepared.parts.refiner is not None and plan is not None
    report = session.report("refine")
    names = list(prepared.refiner_windows)
    keys = [prepared.losses_key(prepared.space, part) for part in prepared.refiner_windows.values()]
    games: list[ModelGame] = []

    def progress(done: int, total: int) -> None:
        report(min(config.refine, round(sum(game.forwards for game in games))), config.refine)

    with closing(MeasurementLog(folder.path / "refinement.jsonl", keys[0])) as log, \
            closing(MeasurementLog(folder.path / "referee.jsonl", keys[1])) as referee_log:
        for name, one_log in zip(names, (log, referee_log), strict=True):
            games.append(session.refining(name, one_log, progress))
        game, referee = games
        estimate = search.estimate.on(prepared.space) if search.estimate else None
        plan = prepared.parts.refiner.refine(plan, estimate, game, referee, float(config.refine),
                                             np.random.default_rng([config.seed, *REFINE_STREAM]))
        plan = replace(plan, file_bytes=prepared.promise(plan))
        plan.save(folder.searched_plan)
        session.plugins.notify("impq_plan_ready", plan=plan)
        report(config.refine, config.refine)
        return replace(search, plan=plan, measured_loss=game.loss(plan.pick),
                       refine_forwards=game.forwards + referee.forwards)


def tested(session: Session, folder: RunFolder, search: Search) -> Search:
    """The search with the plan that its run goes on with: the uniform model of its budget, if the plan of the estimate
    does not beat it. A plan that was given stays."""
    if search.plan is None or search.estimate is None:
        return search
    plan, test = against_uniform(session, folder, search.plan, search.estimate)
    if plan is search.plan:
        return replace(search, uniform_test=test)
    return replace(search, plan=plan, measured_loss=None, uniform_test=test, estimated=search.plan)


def result_of(prepared: Prepared, folder: RunFolder, search: Search, evaluation: Evaluation | None,
              seconds: dict[str, float]) -> RunResult:
    """The result of a run from the results of its stages."""
    texts = {"calibration": prepared.calibration, "evaluation": prepared.evaluation,
             **{f"evaluation {text.name}": text for text in prepared.held_out[1:]}}
    return RunResult(folder.path, prepared.config, search.plan, evaluation, search.estimate, search.measurements,
                     search.measured_loss, search.forwards, prepared.rest_bytes, seconds,
                     {role: text.digest for role, text in texts.items() if text}, search.uniform_test)
