"""One run, in the order of things; no other file knows it."""

from __future__ import annotations

import json
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluator, KeptScores, ScoreLog, evaluate_plan
from impq_core.files import write_text
from impq_core.game.model_game import ModelGame
from impq_core.game.probe import ModelProbe
from impq_core.interfaces import Backend
from impq_core.ledger import Ledger, MeasurementLog, refuse_changes
from impq_core.model.bank import Bank, fill_bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.cache import Shelf, shelf_for
from impq_core.model.layers import resolve_dtype
from impq_core.plugins import Plugins
from impq_core.results import Evaluation, RunResult
from impq_core.runs.folder import RunFolder, recorded
from impq_core.runs.prepare import Prepared, prepare
from impq_core.space import Choice, SearchSpace
from impq_core.types import Measurements, Plan, SensitivityEstimate


def run(config: RunConfig, plugins: Plugins | None = None, only_estimate: bool = False) -> RunResult:
    """Estimate, allocate, quantize and evaluate as configured.

    Args:
        config: what to do.
        plugins: who can do it, and who watches; the installed plugins by default.
        only_estimate: stop when the estimate is there; ``resume`` goes on.

    Raises:
        ImpqError: anything the user can mend.
    """
    plugins = plugins or Plugins()
    prepared = prepare(config, plugins)
    folder = make_folder(prepared)
    with folder.locked():
        try:
            _start(prepared, plugins, folder)
        except BaseException:
            shutil.rmtree(folder.path)
            with suppress(OSError):  # not empty: it was there before, or others use it
                folder.path.parent.rmdir()
            raise
        return _watched(prepared, plugins, folder, only_estimate)


def resume(path: str | Path, plugins: Plugins | None = None) -> RunResult:
    """Go on with a run that ended early; a finished one comes out once more.

    Nothing that is in the run's logs or in the cache is measured or made again. Estimate and plan are, bit for bit,
    those of a run that was never interrupted, on the same machine.

    Args:
        path: the run's folder.
        plugins: who can do it, and who watches; the installed plugins by default.

    Raises:
        ImpqError: it is no run, another process is at work in it, or its model, texts, backend, options or code are
            not what they were.
    """
    plugins = plugins or Plugins()
    folder = RunFolder.open(path, "provenance.json")
    prepared = prepare(folder.read_config(), plugins)
    refuse_changes(folder.read_json(folder.provenance), prepared.provenance, str(path))
    with folder.locked():
        _start(prepared, plugins, folder)
        result = _watched(prepared, plugins, folder, only_estimate=False)
        folder.error.unlink(missing_ok=True)
        return result


def make_folder(prepared: Prepared, parent: Path | None = None, name: str = "") -> RunFolder:
    """A new folder that holds what a run is resumed from."""
    return RunFolder.create(parent or Path(prepared.config.output), {
        "impq.toml": recorded(prepared.config).to_toml(),
        "provenance.json": json.dumps(prepared.provenance, indent=1) + "\n",
        "space.json": json.dumps(prepared.space.to_dict(), indent=1) + "\n"}, name)


def _start(prepared: Prepared, plugins: Plugins, folder: RunFolder) -> None:
    try:
        plugins.notify("impq_run_started", config=prepared.config, space=prepared.space, folder=folder.path)
    except BaseException as error:
        plugins.notify("impq_run_failed", error=error)
        raise


def _watched(prepared: Prepared, plugins: Plugins, folder: RunFolder, only_estimate: bool) -> RunResult:
    try:
        result = _carry_out(prepared, plugins, folder, only_estimate)
    except BaseException as error:
        with suppress(OSError):  # the disk may be what ended it
            write_text(folder.error, "".join(traceback.format_exception(error)))
        plugins.notify("impq_run_failed", error=error)
        raise
    plugins.notify("impq_run_finished", result=result)
    return result


def load_runner(prepared: Prepared) -> BlockwiseModel:
    """The model with its weights, ready to run block by block."""
    return BlockwiseModel(prepared.source.load(resolve_dtype(prepared.config.dtype)))


def quantize_all(prepared: Prepared, runner: BlockwiseModel, progress: Callable[[int, int], None]) -> Bank:
    """Store every layer at every width of the menu and between; the model must stand at its own weights."""
    return _fill(prepared, runner, prepared.space, prepared.parts.backend, _deployed_menus(prepared), progress)


def quantize_played(prepared: Prepared, runner: BlockwiseModel, progress: Callable[[int, int], None]) -> Bank:
    """The same for the variants that are measured, where ``estimate_with`` makes them."""
    backend = prepared.parts.estimate_with or prepared.parts.backend
    return _fill(prepared, runner, prepared.played, backend, _menus(prepared.played), progress)


def make_evaluator(prepared: Prepared, runner: BlockwiseModel, bank: Bank, log: ScoreLog) -> Evaluator:
    """Who scores plans with the deployed backend's variants, and knows the scores of other runs."""
    shelf = _shelf(prepared, prepared.parts.backend, _deployed_menus(prepared))
    kept = KeptScores(shelf, prepared.evaluation.digest, bank.layers) if shelf else None
    return Evaluator(runner, bank, prepared.evaluation, log, kept)


def _deployed_menus(prepared: Prepared) -> list[list[Choice]]:
    return _menus(prepared.space, [choice for choice, _ in prepared.between])


def _menus(space: SearchSpace, between: Sequence[Choice] = ()) -> list[list[Choice]]:
    """Widest first, for every layer."""
    menu = sorted([*space.choices, *between], reverse=True)
    return [menu] * len(space) + [[pin.choice] if pin.choice else [] for pin in space.pinned]


def _fill(prepared: Prepared, runner: BlockwiseModel, space: SearchSpace, backend: Backend,
          menus: Sequence[Sequence[Choice]], progress: Callable[[int, int], None]) -> Bank:
    bank = Bank(runner.model, space.everyone, backend, resolve_dtype(prepared.config.dtype))
    hidden = None
    if backend.needs:
        assert prepared.calibration is not None
        hidden = runner.embed(prepared.calibration.ids)
    fill_bank(bank, runner, hidden, menus, progress, _shelf(prepared, backend, menus))
    return bank


def _shelf(prepared: Prepared, backend: Backend, menus: Sequence[Sequence[Choice]]) -> Shelf | None:
    if not prepared.config.cache:
        return None
    try:
        shelf = shelf_for(prepared.made_of(backend, menus))
    except ImpqError as error:
        warnings.warn(f"variants are not kept for another time: {error}", RuntimeWarning, stacklevel=2)
        return None
    shelf.touch()
    return shelf


@dataclass(frozen=True, eq=False)
class Search:
    """What came out of the search: a plan, and what it rests on (None where the plan was given, or no text read)."""

    plan: Plan | None
    estimate: SensitivityEstimate | None
    measurements: Measurements | None
    measured_loss: float | None


def _carry_out(prepared: Prepared, plugins: Plugins, folder: RunFolder, only_estimate: bool) -> RunResult:
    clock = Clock()
    apart = prepared.parts.estimate_with is not None and prepared.plan is None
    with clock.stage("quantize"):
        runner = load_runner(prepared)
        make = quantize_played if apart else quantize_all
        bank = make(prepared, runner, report(plugins, "quantize"))
    if not apart:
        _variants_ready(plugins, folder, bank, clock)
    search = _search(prepared, plugins, folder, runner, bank, clock, only_estimate)
    if apart and not only_estimate:
        bank.apply([None] * len(bank.layers))
        with clock.stage("quantize"):
            bank = quantize_all(prepared, runner, report(plugins, "quantize"))
        _variants_ready(plugins, folder, bank, clock)
    refined, evaluation = 0.0, None
    if not only_estimate:
        if prepared.parts.refiner:
            with clock.stage("refine"):
                search, refined = _refine(prepared, plugins, folder, runner, bank, search)
        with clock.stage("evaluate"), closing(score_log(prepared, folder.scores)) as log:
            assert search.plan is not None
            evaluation = evaluate_plan(make_evaluator(prepared, runner, bank, log), search.plan, prepared.between,
                                       prepared.evaluation, prepared.config.seed, report(plugins, "evaluate"))
            evaluation.save(folder.evaluation)
    forwards = refined + (search.estimate.forwards if search.estimate else 0.0)
    folder.write_json(folder.cost, {"forwards": forwards, "seconds": clock.seconds})
    return make_result(prepared, folder, search, evaluation, forwards, clock.seconds)


def make_result(prepared: Prepared, folder: RunFolder, search: Search, evaluation: Evaluation | None, forwards: float,
                seconds: dict[str, float]) -> RunResult:
    """The result of a run from the results of its stages."""
    texts = {"calibration": prepared.calibration, "evaluation": prepared.evaluation}
    return RunResult(folder.path, prepared.config, search.plan, evaluation, search.estimate, search.measurements,
                     search.measured_loss, forwards, prepared.rest_bytes, seconds,
                     {role: text.digest for role, text in texts.items() if text})


def _variants_ready(plugins: Plugins, folder: RunFolder, bank: Bank, clock: Clock) -> None:
    bank.save_record(folder.variants)
    plugins.notify("impq_variants_ready", nbytes=bank.nbytes, seconds=clock.seconds["quantize"])


@contextmanager
def playing(prepared: Prepared, plugins: Plugins, folder: RunFolder, runner: BlockwiseModel,
            bank: Bank) -> Iterator[tuple[ModelGame | None, ModelProbe]]:
    """The game and the probe of an estimator on the variants of a bank; what they find is logged in a folder. There is
    no game where nobody reads calibration text."""
    played, config = prepared.played, prepared.config
    windows = prepared.calibration.first(config.game_windows) if prepared.calibration else None
    about = {"space": played.fingerprint, **prepared.measured_on, "value": config.value}
    if windows and prepared.probed:
        about |= {"game_digest": windows.digest, "game_tokens": windows.scored_tokens}
    with closing(MeasurementLog(folder.losses, about)) as log, closing(Ledger(folder.slopes, "impq-gradients/1", {
            **about, "probe_digest": prepared.probed.digest if prepared.probed else ""})) as slopes:
        probe = ModelProbe(played, bank, runner, prepared.probed, config.value, config.game_windows, slopes)
        yield None if windows is None else ModelGame(
            played, bank, runner, windows, log, progress=report(plugins, "estimate"), value=config.value,
            budget_bytes=prepared.played_budget, spare=prepared.spare, probe=probe,
            watch=lambda picks, losses, forwards: plugins.notify(
                "impq_measured", picks=picks, losses=losses, forwards=forwards)), probe


def play(config: RunConfig, plugins: Plugins | None = None) -> ModelGame:
    """The game of a configuration's model, for a script to play: the model is loaded and quantized at every width, no
    folder is made, and nothing is logged.

    Args:
        config: what to play; its estimator must be one that reads text.
        plugins: who makes the variants; the installed plugins by default.

    Raises:
        ImpqError: anything the user can mend.
    """
    plugins = plugins or Plugins()
    prepared = prepare(config, plugins)
    if prepared.calibration is None or prepared.probed is None:
        raise ImpqError(f"estimator '{config.estimator}' reads no text to play on: name one that does, such as spqe")
    runner = load_runner(prepared)
    bank = quantize_played(prepared, runner, report(plugins, "quantize"))
    probe = ModelProbe(prepared.played, bank, runner, prepared.probed, config.value, config.game_windows)
    return ModelGame(prepared.played, bank, runner, prepared.calibration.first(config.game_windows), value=config.value,
                     budget_bytes=prepared.played_budget, spare=prepared.spare, probe=probe)


def _search(prepared: Prepared, plugins: Plugins, folder: RunFolder, runner: BlockwiseModel, bank: Bank, clock: Clock,
            only_estimate: bool) -> Search:
    """Estimate on the variants of a bank and allocate; a plan that was given is only measured."""
    with playing(prepared, plugins, folder, runner, bank) as (game, probe):
        plan, estimate, measurements = prepared.plan, None, None
        if plan is None:
            with clock.stage("estimate"):
                estimate, measurements = prepared.parts.estimate(game, probe,
                                                                 np.random.default_rng(prepared.config.seed))
                keep_estimate(plugins, folder, estimate, measurements)
            if only_estimate:
                return Search(None, estimate, measurements, None)
            with clock.stage("allocate"):
                plan = allocate(prepared, estimate)
        plan.save(folder.plan)
        plugins.notify("impq_plan_ready", plan=plan)
        return Search(plan, estimate, measurements, game.loss(plan.pick) if game else None)


def keep_estimate(plugins: Plugins, folder: RunFolder, estimate: SensitivityEstimate,
                  measurements: Measurements | None) -> None:
    """Write an estimate and what it was fitted to, and tell who watches."""
    if measurements is not None:
        measurements.save(folder.measurements)
    estimate.save(folder.estimate)
    if (gains := int((estimate.linear[:, -1] < 0).sum())) > 0.9 * len(estimate.space):
        warnings.warn(f"the estimate says that {gains} of {len(estimate.space)} layers are better at their narrowest "
                      "width than at their widest: is a sign wrong?", RuntimeWarning, stacklevel=2)
    plugins.notify("impq_estimate_ready", estimate=estimate, measurements=measurements)


def allocate(prepared: Prepared, estimate: SensitivityEstimate) -> Plan:
    """The plan of a run's allocator, with its provenance."""
    plan = prepared.parts.allocator.allocate(estimate.on(prepared.space), prepared.budget_bytes)
    return replace(plan, nats=estimate.nats, provenance={**prepared.provenance, "estimate": estimate.method})


def _refine(prepared: Prepared, plugins: Plugins, folder: RunFolder, runner: BlockwiseModel, bank: Bank,
            search: Search) -> tuple[Search, float]:
    """A better plan near the one found, and what it cost; proposals are judged on windows held back for that."""
    config, refiner, plan = prepared.config, prepared.parts.refiner, search.plan
    assert refiner is not None and prepared.calibration is not None and plan is not None
    windows = (prepared.calibration.first(config.game_windows),
               prepared.calibration.part(config.game_windows, 2 * config.game_windows))
    logs = [MeasurementLog(folder.path / f"{name}.jsonl", {
        "space": prepared.space.fingerprint, **prepared.measured_on, "value": config.value,
        "game_digest": part.digest, "game_tokens": part.scored_tokens})
        for name, part in zip(("refinement", "referee"), windows, strict=True)]
    tell = report(plugins, "refine")
    games: list[ModelGame] = []

    def watch(done: int, total: int) -> None:
        tell(min(config.refine, round(sum(game.forwards for game in games))), config.refine)

    try:
        games += [ModelGame(prepared.space, bank, runner, part, log, progress=watch, value=config.value)
                  for part, log in zip(windows, logs, strict=True)]
        game, referee = games
        estimate = search.estimate.on(prepared.space) if search.estimate else None
        plan = refiner.refine(plan, estimate, game, referee, float(config.refine),
                              np.random.default_rng([config.seed, 1]))
        plan.save(folder.plan)
        plugins.notify("impq_plan_ready", plan=plan)
        tell(config.refine, config.refine)
        return replace(search, plan=plan, measured_loss=game.loss(plan.pick)), game.forwards + referee.forwards
    finally:
        for log in logs:
            log.close()


def score_log(prepared: Prepared, path: Path) -> ScoreLog:
    """The log of held-out scores of a run's model and variants."""
    return ScoreLog(path, {**prepared.measured_on, "evaluation": str(prepared.evaluation),
                           "evaluation_digest": prepared.evaluation.digest,
                           "layers": [layer.name for layer in prepared.space.everyone]})


def report(plugins: Plugins, stage: str) -> Callable[[int, int], None]:
    """Tell who watches how far a stage is."""
    return lambda done, total: plugins.notify("impq_progress", stage=stage, done=done, total=total)


class Clock:
    """Seconds by stage, for the curious: costs are counted in forwards."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside as the stage's."""
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 2)
