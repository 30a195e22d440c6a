"""A session: a prepared run with its model and the variants of its layers, for games, probes and scores."""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch

from impq_core.errors import ImpqError, one_line
from impq_core.evaluate import HELD_OUT, Evaluator, KeptScores, ScoreLog, SequentialEvaluator, evaluate_plan
from impq_core.files import abandoned, discard, scratch_folder
from impq_core.game.model_game import ModelGame
from impq_core.game.passes import Passes
from impq_core.game.probe import ModelProbe
from impq_core.interfaces import Backend, CarryOut, Task
from impq_core.ledger import Ledger, MeasurementLog
from impq_core.model.bank import Bank
from impq_core.model.blockwise import BlockwiseModel
from impq_core.model.cache import Shelf, shelf_for
from impq_core.model.demo import cache_folder
from impq_core.model.device import resolve_dtype
from impq_core.model.quantize import Filling, fill_bank, quantize_in_sequence
from impq_core.model.text import Windows
from impq_core.plugins import Plugins
from impq_core.results import Evaluation
from impq_core.runs.folder import RunFolder
from impq_core.runs.footprint import plan_memory
from impq_core.runs.prepare import Prepared
from impq_core.runs.work import work_of
from impq_core.space import Choice, IntArray, SearchSpace
from impq_core.types import Plan

SCRATCH = "impq-weights"
"""Name of the temporary folder with the weights that no file of the model holds one to one."""

GAME = "estimate"
"""Name of the estimator's game, for workers."""

HELD_BACK = "held back"
"""Name of the windows that a plan is tested on against a uniform model, for workers."""

Progress = Callable[[int, int], None]
"""Called with the number of finished units of a stage, and the number of all units."""


Share = Callable[[Prepared], CarryOut]
"""Gives the workers that carry out the tasks of a prepared run."""


class Session:
    """The model of a prepared run, and the bank of its variants.

    ``quantize_for_game`` or ``quantize_deployed`` must be called before a game or an evaluation.

    Args:
        prepared: the run.
        plugins: the observers of the progress.
        runner: the model, if another session has loaded it.
        share: gives the workers that carry out the tasks of a prepared run; None if there are none.

    Attributes:
        prepared: the run.
        device: where blocks compute.
        dtype: type of the forwards.
        runner: the model, block by block.
        bank: the variants.
        clock: seconds by stage.
    """

    def __init__(self, prepared: Prepared, plugins: Plugins, runner: BlockwiseModel | None = None,
                 share: Share | None = None) -> None:
        self.prepared, self.plugins, self.clock, self._share = prepared, plugins, Clock(), share
        if prepared.config.threads:
            torch.set_num_threads(prepared.config.threads)
        self.device = prepared.device
        self.dtype = resolve_dtype(prepared.config.dtype, self.device)
        self.runner = runner or self._load()
        self.bank = Bank(self.runner, prepared.space.everyone, prepared.parts.backend)
        if self.bank.embedding is not None or self.bank.head is not None:
            self.runner.check_ends(prepared.evaluation.ids)

    def _load(self) -> BlockwiseModel:
        gc.collect()  # a model of an earlier run may be part of a cycle, and keeps its memory on the device until then
        plan, source = plan_memory(self.prepared), self.prepared.source
        if plan.shortfall:
            warnings.warn(plan.shortfall, RuntimeWarning, stacklevel=3)
        if not plan.streamed:
            return BlockwiseModel(source.load(self.dtype).to(self.device), self.device, room=plan.room)
        parent = cache_folder() if self.prepared.config.cache else Path(tempfile.gettempdir())
        for left in abandoned(parent):
            if left.name.startswith(f".{SCRATCH}."):
                discard(left)
        with ExitStack() as stack:
            folder = stack.enter_context(scratch_folder(parent, SCRATCH))
            model, stored = source.load_streamed(self.dtype, self.device, folder)
            runner = BlockwiseModel(model, self.device, stored, plan.room)
            weakref.finalize(runner, stack.pop_all().close)  # runners are shared between sessions
        return runner

    def report(self, stage: str) -> Progress:
        """A function that reports the progress of a stage to the observers."""
        return lambda done, total: self.plugins.notify("impq_progress", stage=stage, done=done, total=total)

    def quantize_for_game(self) -> None:
        """Make or load every variant that the estimator measures."""
        self._quantize(self.prepared.game_space, self.prepared.game_backend, self.prepared.game_menus)

    def quantize_deployed(self) -> None:
        """Make or load every variant of plans and references."""
        self._quantize(self.prepared.space, self.prepared.parts.backend, self.prepared.deployed_menus)

    def _quantize(self, space: SearchSpace, backend: Backend, menus: Sequence[Sequence[Choice]]) -> None:
        with self.clock.stage("quantize"):
            report = self.report("quantize")
            if self.carry_out and "gradients" not in backend.needs:
                self._quantize_by_workers(self.filling(space, backend, menus), self.carry_out, report)
                report = _silent
            self._new_bank(space, backend, menus)
            fill_bank(self.bank, self.runner, self._calibration_ids(backend), menus, report,
                      self.prepared.further_choices(backend), self._unquantized)
            self.report("quantize")(len(self.runner), len(self.runner))

    def filling(self, space: SearchSpace, backend: Backend, menus: Sequence[Sequence[Choice]]) -> Filling:
        """A bank without variants yet, as ``bank``, and what fills it block by block."""
        self._new_bank(space, backend, menus)
        return Filling(self.bank, self.runner, self._calibration_ids(backend), menus,
                       self.prepared.further_choices(backend), self._unquantized)

    def _new_bank(self, space: SearchSpace, backend: Backend, menus: Sequence[Sequence[Choice]]) -> None:
        self.bank.apply([None] * len(self.bank.layers))  # its layers may differ from the new bank's
        self.bank = Bank(self.runner, space.everyone, backend, self._shelf(backend, menus))

    @property
    def _unquantized(self) -> bool:
        return self.prepared.config.prefix == "unquantized"

    def _quantize_by_workers(self, filling: Filling, carry_out: CarryOut, report: Progress) -> None:
        """Let workers put variants on the shelf, a block in each task. Behind a prefix at the widest choices, those are
        made here: each block waits for them."""
        waits = bool(self.bank.backend.needs) and not self._unquantized

        def tasks() -> Iterator[Task]:
            for index in filling.blocks:
                if waits:
                    filling.make(index, filling.missing(index, widest=True))
                if filling.missing(index):
                    yield {"kind": "variants", "deployed": self.bank.backend is self.prepared.parts.backend,
                           "block": index}

        report(0, len(self.runner))
        for done, (task, _) in enumerate(carry_out(tasks()), start=1):
            if filling.missing(task["block"]):
                raise ImpqError(f"the variants that a worker made are not in the cache {cache_folder()}: workers on "
                                "other machines need that folder on a shared file system (IMPQ_CACHE) with free space")
            report(min(done, len(self.runner)), len(self.runner))

    @property
    def carry_out(self) -> CarryOut | None:
        """The workers that carry out tasks; None if there are none. They prepare themselves for the whole run, and each
        task names the windows of the search: searches on several parts of a text take turns without loading anew."""
        if not self._share:
            return None
        carry_out, search = self._share(replace(self.prepared, search=None)), self.prepared.search
        if not search:
            return carry_out
        return lambda tasks: carry_out({**task, "search": [*search]} for task in tasks)

    def quantize_plan(self, plan: Plan) -> None:
        """Quantize a plan block after block, each behind the quantized ones. Afterwards the model has the plan's
        weights.

        The session must have no variants yet: those of a run have statistics behind another prefix.
        """
        quantize_in_sequence(self.bank, self.runner, self._calibration_ids(self.bank.backend),
                             self.prepared.space.assignment(plan.pick), self.report("quantize"))

    def _calibration_ids(self, backend: Backend) -> IntArray | None:
        if not backend.needs:
            return None
        assert self.prepared.calibration is not None
        return self.prepared.calibration.ids

    def _shelf(self, backend: Backend, menus: Sequence[Sequence[Choice]]) -> Shelf | None:
        if not self.prepared.config.cache:
            return None
        try:
            shelf = shelf_for(self.prepared.variants_key(backend, menus))
        except ImpqError as error:
            warnings.warn(f"variants are not kept for later runs: {one_line(error)}", RuntimeWarning, stacklevel=2)
            return None
        shelf.touch()
        return shelf

    def probe(self, log: Ledger | None = None, text: Windows | None = None) -> ModelProbe:
        """The probe of the estimator.

        Args:
            log: file of slopes and traces.
            text: windows to read; the run's by default.
        """
        config, prepared = self.prepared.config, self.prepared
        windows, work = text or prepared.probed, work_of(prepared)
        passes = Passes(self.report("gradients"), len(windows.ids) * work.passes if windows and work else 0)
        carry_out = self.carry_out if text is None else None  # workers read the run's text
        return ModelProbe(prepared.game_space, self.bank, self.runner, windows, config.value, config.game_windows, log,
                          carry_out, passes)

    def game(self, log: MeasurementLog | None = None, probe: ModelProbe | None = None,
             text: Windows | None = None) -> ModelGame:
        """The game of the estimator, on the run's windows of the game; the spare ones are further sets of windows.

        Args:
            log: file of measured losses.
            probe: ``probe()`` by default.
            text: calibration windows; the run's by default.

        Raises:
            ImpqError: the run reads no calibration text.
        """
        prepared, count = self.prepared, self.prepared.config.game_windows
        windows, spare, carry_out = prepared.game_windows, prepared.spare, self.carry_out
        if text is not None:
            carry_out = None  # workers play on the run's text
            windows, spare = text.first(count), text.part(count, len(text.ids))
        if windows is None:
            prepared.require_text()
        assert windows is not None
        return ModelGame(
            prepared.game_space, self.bank, self.runner, windows, log, progress=self.report("estimate"),
            value=prepared.config.value, budget_bytes=prepared.game_budget, spare=spare, probe=probe or self.probe(),
            watch=lambda picks, losses, forwards: self.plugins.notify(
                "impq_measured", picks=picks, losses=losses, forwards=forwards), carry_out=carry_out, name=GAME)

    def refining(self, name: str, log: MeasurementLog | None = None,
                 progress: Progress = lambda done, total: None) -> ModelGame:
        """The game of the refiner, on the same windows as the estimator's but with the deployed variants, or that of
        its referee, on other windows.

        Args:
            name: ``refinement`` or ``referee``.
            log: file of measured losses.
            progress: see ``ModelGame``.
        """
        prepared = self.prepared
        return ModelGame(prepared.space, self.bank, self.runner, prepared.refiner_windows[name], log, progress=progress,
                         value=prepared.config.value, carry_out=self.carry_out, name=name)

    @contextmanager
    def playing(self, folder: RunFolder) -> Iterator[tuple[ModelGame | None, ModelProbe]]:
        """The game and the probe of the estimator, logged in a folder. The game is None if no part reads calibration
        text."""
        prepared = self.prepared
        losses, slopes = prepared.losses_key(prepared.game_space, prepared.game_windows), prepared.slopes_key
        with closing(MeasurementLog(folder.losses, losses)) as log, \
                closing(Ledger(folder.slopes, "impq-gradients/2", slopes)) as slope_log:
            probe = self.probe(slope_log)
            yield self.game(log, probe) if prepared.calibration else None, probe

    def evaluator(self, log: ScoreLog | None = None, name: str = HELD_OUT) -> Evaluator:
        """The evaluator of the run's table, of the deployed variants or of models quantized in sequence; it reads the
        scores of other runs from the cache.

        Args:
            log: file of the scores.
            name: of the texts to score on: those of the table, or ``HELD_BACK``.
        """
        prepared, carry_out = self.prepared, self.carry_out
        texts = prepared.held_out
        if name == HELD_BACK:
            assert prepared.held_back is not None
            texts = (prepared.held_back,)
        shelf = self._shelf(prepared.parts.backend, prepared.deployed_menus)
        kept = KeptScores(shelf, [text.digest for text in texts], self.bank.layers,
                          prepared.sequence) if shelf else None
        if prepared.sequence:
            assert prepared.calibration is not None
            return SequentialEvaluator(self.runner, self.bank, texts, prepared.calibration.ids, log, kept, carry_out,
                                       name)
        return Evaluator(self.runner, self.bank, texts, log, kept, carry_out, name)

    def evaluator_of_exports(self) -> Evaluator:
        """An evaluator of a model that is quantized in sequence, which reads no scores from the cache. Call it while
        the model has its unquantized weights."""
        return Evaluator(self.runner, self.bank, self.prepared.held_out)

    def score_log(self, path: Path) -> ScoreLog:
        """The log of held-out scores in a file."""
        return ScoreLog(path, self.prepared.scores_key)

    def evaluate(self, evaluator: Evaluator, plan: Plan, same_size: bool = True,
                 estimated: Plan | None = None) -> Evaluation:
        """Score a plan and its references; without ``same_size``, only those that plans of any size share.
        ``estimated`` is that of ``evaluate_plan``."""
        prepared = self.prepared
        return evaluate_plan(evaluator, plan, prepared.between, prepared.mixes, prepared.config.seed,
                             self.report("evaluate"), same_size, prepared.meterings, estimated)

    def with_prepared(self, prepared: Prepared) -> Session:
        """A session with the same model and bank for another estimator or budget of the same space."""
        other = copy(self)
        other.prepared = prepared
        return other

    def for_space(self, prepared: Prepared) -> Session:
        """A session with the same model and variants for other layers or another menu."""
        self.bank.apply([None] * len(self.bank.layers))
        other = Session(prepared, self.plugins, self.runner, self._share)
        other.bank.add_all(self.bank)
        return other


def _silent(done: int, total: int) -> None:
    """Reports nothing."""


class Clock:
    """Wall-clock seconds by stage. Costs are counted in forwards, not in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the ``with`` block to a stage."""
        start = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 2)
