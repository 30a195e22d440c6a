"""One run, in the order of things; no other file knows it."""

from __future__ import annotations

import importlib.metadata
import json
import secrets
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.bank import Bank, fill_bank
from impq_core.blockwise import BlockwiseModel
from impq_core.budget import Budget
from impq_core.config import RunConfig
from impq_core.errors import ImpqError
from impq_core.evaluate import Evaluation, Evaluator, evaluate_plan
from impq_core.files import write_text
from impq_core.game import MeasurementLog, ModelGame
from impq_core.interfaces import Backend
from impq_core.model import layers_of, resolve_dtype, rest_parameters, search_space
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.probe import ModelProbe
from impq_core.source import ModelSource, locate_model
from impq_core.space import Choice, SearchSpace
from impq_core.text import Windows, check_source, draw_windows, refuse_overlap
from impq_core.types import Measurements, Plan, SensitivityEstimate


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run leaves behind; the same things are files in ``folder``.

    ``measured_loss`` is the plan's loss in the game it was estimated from, nats per token above the reference, to
    hold against ``plan.predicted_loss`` (None where no text was read); ``forwards`` the cost of the search in
    full-model forwards; ``rest_bytes`` what embeddings, head and all else that is never quantized take at 16 bits;
    ``seconds`` by stage; ``digests`` of the tokens of both texts.
    """

    folder: Path
    config: RunConfig
    plan: Plan
    evaluation: Evaluation
    estimate: SensitivityEstimate | None
    measurements: Measurements | None
    measured_loss: float | None
    forwards: float
    rest_bytes: int
    seconds: dict[str, float]
    digests: dict[str, str]

    @property
    def model_bytes(self) -> int:
        """The whole model under the plan."""
        return self.plan.nbytes + self.rest_bytes


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run of which everything that can be checked without the weights has been checked.

    ``played`` is the space the estimator sees: the layers and widths of ``space`` at the sizes of the backend whose
    variants are measured. ``between`` are the backend's widths between the menu's that uniform references are made
    of, each with its bytes.
    """

    config: RunConfig
    parts: Parts
    source: ModelSource
    space: SearchSpace
    played: SearchSpace
    between: tuple[tuple[Choice, int], ...]
    budget_bytes: int
    rest_bytes: int
    plan: Plan | None
    calibration: Windows | None
    evaluation: Windows

    @property
    def played_budget(self) -> int:
        """The budget in the space the estimator sees: the same place between all-low and all-high."""
        if self.played is self.space:
            return self.budget_bytes
        place = (self.budget_bytes - self.space.low_bytes) / max(1, self.space.high_bytes - self.space.low_bytes)
        return round(self.played.low_bytes + place * (self.played.high_bytes - self.played.low_bytes))

    @property
    def spare(self) -> Windows | None:
        """Calibration windows that neither the game nor a refinement's referee takes."""
        taken = self.config.game_windows * (2 if self.config.refine else 1)
        return self.calibration.part(taken, len(self.calibration.ids)) if self.calibration else None

    @property
    def probed(self) -> Windows | None:
        """Calibration windows that are looked at from inside: all but a refinement's referee's, or as many of them as
        asked for."""
        if self.calibration is None:
            return None
        played, config = self.config.game_windows, self.config
        ids = self.calibration.ids
        kept = np.concatenate([ids[:played], ids[played * (2 if config.refine else 1):]])
        return replace(self.calibration, ids=kept[:config.probe_windows or len(kept)])


def prepare(config: RunConfig, plugins: Plugins, calibrate: bool = True) -> Prepared:
    """Resolve and check a configuration: names, options, files, sizes, budget, texts. Loads no weights, writes
    nothing.

    Args:
        config: what to do.
        plugins: who can do it.
        calibrate: false where nothing is to be measured or quantized: the calibration text is left alone.

    Raises:
        ImpqError: whatever is wrong, in one line.
    """
    parts = Parts.build(config, plugins)
    calibrate = calibrate and parts.needs_calibration
    for text in (config.calibration, config.evaluation) if calibrate else (config.evaluation,):
        check_source(text.source)
    source = locate_model(config.model, config.trust_remote_code)
    skeleton = source.skeleton()
    layers = layers_of(skeleton, config.granularity)
    space = search_space(layers, parts.backend, parts.menu, config.pins, config.exclude)
    played = space
    if parts.estimate_with and not config.plan:  # a plan that is given is measured as it will be deployed
        played = search_space(layers, parts.estimate_with, parts.played, config.pins, config.exclude)
    for part in (parts.estimator, parts.surrogate, parts.allocator):
        part.check_space(played)
    inside = [choice for choice in parts.backend.choices()
              if parts.menu[-1] < choice < parts.menu[0] and choice not in parts.menu]
    between = []
    for choice in inside:
        alone = search_space(layers, parts.backend, (choice,), config.pins, config.exclude)
        between.append((choice, alone.high_bytes))
    budget = parts.budget or Budget((parts.menu[0].bits + parts.menu[-1].bits) / 2, "bits")
    budget_bytes = budget.resolve(space)
    plan = Plan.load(Path(config.plan), space) if config.plan else None
    tokenizer, vocabulary = source.tokenizer(), skeleton.get_input_embeddings().num_embeddings
    evaluation = draw_windows(config.evaluation, "evaluation", tokenizer, vocabulary)
    calibration = None
    if calibrate:
        calibration = draw_windows(config.calibration, "calibration", tokenizer, vocabulary)
        refuse_overlap(calibration, evaluation)
    dtype = str(resolve_dtype(config.dtype)).removeprefix("torch.")
    resolved = replace(
        config, model=_absolute(config.model), plan=_absolute(config.plan),
        calibration=replace(config.calibration, source=_absolute(config.calibration.source)),
        evaluation=replace(config.evaluation, source=_absolute(config.evaluation.source)),
        bits=tuple(choice.bits for choice in parts.menu), budget=str(budget), dtype=dtype, options=parts.options())
    return Prepared(resolved, parts, source, space, played, tuple(between), budget_bytes,
                    2 * rest_parameters(skeleton, layers), plan, calibration, evaluation)


def _absolute(name: str) -> str:
    """A file's path made absolute, so that the resolved configuration runs from anywhere; other names as they are."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in ("", "demo") and path.exists() else name


def run(config: RunConfig, plugins: Plugins | None = None) -> RunResult:
    """Estimate, allocate, quantize and evaluate as configured.

    Args:
        config: what to do.
        plugins: who can do it, and who watches; the installed plugins by default.

    Raises:
        ImpqError: anything the user can mend.
    """
    plugins = plugins or Plugins()
    prepared = prepare(config, plugins)
    folder = _make_folder(Path(config.output))
    try:
        write_text(folder / "impq.toml", prepared.config.to_toml())
        plugins.notify("impq_run_started", config=prepared.config, space=prepared.space, folder=folder)
    except BaseException as error:
        plugins.notify("impq_run_failed", error=error)
        shutil.rmtree(folder)
        with suppress(OSError):  # not empty: it was there before, or others use it
            folder.parent.rmdir()
        raise
    try:
        result = _carry_out(prepared, plugins, folder)
    except BaseException as error:
        write_text(folder / "error.txt", "".join(traceback.format_exception(error)))
        plugins.notify("impq_run_failed", error=error)
        raise
    plugins.notify("impq_run_finished", result=result)
    return result


def load_runner(prepared: Prepared) -> BlockwiseModel:
    """The model with its weights, ready to run block by block."""
    return BlockwiseModel(prepared.source.load(resolve_dtype(prepared.config.dtype)))


def quantize_all(prepared: Prepared, runner: BlockwiseModel, progress: Callable[[int, int], None]) -> Bank:
    """Store every layer at every width of the menu and between; the model must stand at its own weights."""
    between = [choice for choice, _ in prepared.between]
    return _fill(prepared, runner, prepared.space, prepared.parts.backend, between, progress)


def quantize_played(prepared: Prepared, runner: BlockwiseModel, progress: Callable[[int, int], None]) -> Bank:
    """The same for the variants that are measured, where ``estimate_with`` makes them."""
    backend = prepared.parts.estimate_with or prepared.parts.backend
    return _fill(prepared, runner, prepared.played, backend, [], progress)


def _fill(prepared: Prepared, runner: BlockwiseModel, space: SearchSpace, backend: Backend,
          between: Sequence[Choice], progress: Callable[[int, int], None]) -> Bank:
    bank = Bank(runner.model, space.everyone, backend, resolve_dtype(prepared.config.dtype))
    menu = sorted([*space.choices, *between], reverse=True)
    menus = [menu] * len(space) + [[pin.choice] if pin.choice else [] for pin in space.pinned]
    hidden = None
    if backend.needs:
        assert prepared.calibration is not None
        hidden = runner.embed(prepared.calibration.ids)
    fill_bank(bank, runner, hidden, menus, progress)
    return bank


@dataclass(frozen=True, eq=False)
class _Search:
    """What came out of the search: a plan, and what it rests on (None where the plan was given, or no text read)."""

    plan: Plan
    estimate: SensitivityEstimate | None
    measurements: Measurements | None
    measured_loss: float | None


def _carry_out(prepared: Prepared, plugins: Plugins, folder: Path) -> RunResult:
    clock = _Clock()
    with clock.stage("quantize"):
        runner = load_runner(prepared)
    search = None
    if prepared.parts.estimate_with and prepared.plan is None:
        with clock.stage("quantize"):
            played = quantize_played(prepared, runner, _progress(plugins, "quantize"))
        search = _search(prepared, plugins, folder, runner, played, clock)
        played.apply([None] * len(played.layers))
    with clock.stage("quantize"):
        bank = quantize_all(prepared, runner, _progress(plugins, "quantize"))
        bank.save_record(folder / "variants.json")
    plugins.notify("impq_variants_ready", nbytes=bank.nbytes, seconds=clock.seconds["quantize"])
    search = search or _search(prepared, plugins, folder, runner, bank, clock)
    refined = 0.0
    if prepared.parts.refiner:
        with clock.stage("refine"):
            search, refined = _refine(prepared, plugins, folder, runner, bank, search)
    with clock.stage("evaluate"):
        evaluator = Evaluator(runner, bank, prepared.evaluation)
        evaluation = evaluate_plan(evaluator, search.plan, prepared.between, prepared.evaluation, prepared.config.seed,
                                   _progress(plugins, "evaluate"))
        evaluation.save(folder / "evaluation.json")
    forwards = refined + (search.estimate.forwards if search.estimate else 0.0)
    result = RunResult(folder, prepared.config, search.plan, evaluation, search.estimate, search.measurements,
                       search.measured_loss, forwards, prepared.rest_bytes, clock.seconds,
                       {role: text.digest for role, text in (("calibration", prepared.calibration),
                                                             ("evaluation", prepared.evaluation)) if text})
    write_text(folder / "cost.json", json.dumps({"forwards": forwards, "seconds": clock.seconds}, indent=1) + "\n")
    return result


def _search(prepared: Prepared, plugins: Plugins, folder: Path, runner: BlockwiseModel, bank: Bank,
            clock: _Clock) -> _Search:
    """Estimate on the variants of a bank and allocate; a plan that was given is only measured."""
    parts, played = prepared.parts, prepared.played
    windows = prepared.calibration.first(prepared.config.game_windows) if prepared.calibration else None
    provenance = _provenance(prepared, windows)
    log = MeasurementLog(folder / "measurements.jsonl", {"space": played.fingerprint, **provenance})
    try:
        probe = ModelProbe(played, bank, runner, prepared.probed, prepared.config.value, prepared.config.game_windows)
        game = None if windows is None else ModelGame(
            played, bank, runner, windows, log, progress=_progress(plugins, "estimate"), value=prepared.config.value,
            budget_bytes=prepared.played_budget, spare=prepared.spare, probe=probe,
            watch=lambda picks, losses, forwards: plugins.notify(
                "impq_measured", picks=picks, losses=losses, forwards=forwards))
        plan, estimate, measurements = prepared.plan, None, None
        if plan is None:
            with clock.stage("estimate"):
                estimate, measurements = parts.estimate(game, probe, np.random.default_rng(prepared.config.seed))
                if measurements is not None:
                    measurements.save(folder / "measurements.npz")
                estimate.save(folder / "estimate.npz")
                plugins.notify("impq_estimate_ready", estimate=estimate, measurements=measurements)
            with clock.stage("allocate"):
                plan = replace(parts.allocator.allocate(estimate.on(prepared.space), prepared.budget_bytes),
                               provenance={**provenance, "estimate": estimate.method})
        plan.save(folder / "plan.json")
        plugins.notify("impq_plan_ready", plan=plan)
        return _Search(plan, estimate, measurements, game.loss(plan.pick) if game else None)
    finally:
        log.close()


def _refine(prepared: Prepared, plugins: Plugins, folder: Path, runner: BlockwiseModel, bank: Bank,
            search: _Search) -> tuple[_Search, float]:
    """A better plan near the one found, and what it cost; proposals are judged on windows held back for that."""
    config, refiner = prepared.config, prepared.parts.refiner
    assert refiner is not None and prepared.calibration is not None
    windows = (prepared.calibration.first(config.game_windows),
               prepared.calibration.part(config.game_windows, 2 * config.game_windows))
    logs = [MeasurementLog(folder / f"{name}.jsonl", {"space": prepared.space.fingerprint,
                                                     **_provenance(prepared, part)})
            for name, part in zip(("refinement", "referee"), windows, strict=True)]
    report = _progress(plugins, "refine")
    games: list[ModelGame] = []

    def watch(done: int, total: int) -> None:
        report(min(config.refine, round(sum(game.forwards for game in games))), config.refine)

    try:
        games += [ModelGame(prepared.space, bank, runner, part, log, progress=watch, value=config.value)
                  for part, log in zip(windows, logs, strict=True)]
        game, referee = games
        estimate = search.estimate.on(prepared.space) if search.estimate else None
        plan = refiner.refine(search.plan, estimate, game, referee, float(config.refine),
                              np.random.default_rng([config.seed, 1]))
        plan.save(folder / "plan.json")
        plugins.notify("impq_plan_ready", plan=plan)
        report(config.refine, config.refine)
        return replace(search, plan=plan, measured_loss=game.loss(plan.pick)), game.forwards + referee.forwards
    finally:
        for log in logs:
            log.close()


def _progress(plugins: Plugins, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: plugins.notify("impq_progress", stage=stage, done=done, total=total)


def _provenance(prepared: Prepared, windows: Windows | None) -> dict[str, Any]:
    """What a loss was measured on: enough to tell whether another one may be held against it."""
    names = ("impq", "torch", "transformers")
    played = prepared.parts.estimate_with or prepared.parts.backend
    return {"model": prepared.source.name, "backend": prepared.config.backend,
            "measured_with": prepared.config.estimate_with or prepared.config.backend,
            "backend_options": asdict(prepared.parts.backend.options), "measured_options": asdict(played.options),
            "dtype": prepared.config.dtype, "value": prepared.config.value,
            "seed": prepared.config.seed, "versions": {name: importlib.metadata.version(name) for name in names},
            **({"calibration": str(prepared.calibration), "calibration_digest": prepared.calibration.digest,
                "game_digest": windows.digest, "game_tokens": windows.scored_tokens}
               if prepared.calibration and windows else {})}


class _Clock:
    """Seconds by stage, for the curious: costs are counted in forwards."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 2)


def _make_folder(parent: Path) -> Path:
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = (parent / name).absolute()
        folder.mkdir()
    except OSError as error:
        raise ImpqError(f"the output folder {parent} cannot be written: {error.strerror}") from error
    return folder


