"""A model, a backend and a granularity. Its plans are measured, and kept as rows.

Everything is measured as a run measures it: losses and gradients are logged before they count, scores are kept with the
variants in the cache, and ``--workers`` shares all of it. A stopped benchmark continues at the next loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from common import Printer
from lines import KEPT
from rows import UNIFORM, UNQUANTIZED, Kept, PlanRow, problem_of
from task_columns import TaskColumns

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.evaluate import Evaluator
from impq_core.game.model_game import ModelGame
from impq_core.model.bank import Assignment
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.references import first_last_high, random_plan
from impq_core.results import Score
from impq_core.runs.folder import RunFolder
from impq_core.runs.orders import workers_of
from impq_core.runs.prepare import Prepared, prepare
from impq_core.runs.session import Session, Share
from impq_core.space import IntArray
from impq_core.trust import NO_TRUST
from impq_core.types import Measurements, Plan, SensitivityEstimate

RANDOM_PLANS = 3
REFERENCES = {"first/last high": 1, "random": RANDOM_PLANS}
"""Number of plans of each reference that no estimate decides."""


@dataclass(frozen=True)
class Method:
    """A way to make plans.

    Args:
        label: its name in tables.
        estimator: name of the estimator.
        allocator, surrogate: names of the allocator and of the surrogate.
        options: options of its parts, by role.
        reads_text: whether the estimate depends on the calibration text, and so on the seed.
        windows: calibration windows of its gradients; 0 for those of the game.
    """

    label: str
    estimator: str
    allocator: str = "qp"
    surrogate: str = "auto"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reads_text: bool = True
    windows: int = 0

    def applied(self, config: RunConfig) -> RunConfig:
        """A configuration with this method's parts and options."""
        return replace(config, estimator=self.estimator, allocator=self.allocator, surrogate=self.surrogate,
                       options=self.options)


@dataclass(frozen=True, eq=False)
class Cell:
    """Plans for one model, backend and granularity.

    Args:
        prepared: the run that the plans are of. Its calibration text is what a backend reads that needs activations;
            the search with a seed reads a part of it.
        kept: where rows go. Logs of losses and gradients are in a folder beside it.
        budgets: in nominal bits.
        plugins: parts and observers.
        share: gives the workers; None if there are none.
        tasks: tasks that the model of each row is asked.
    """

    prepared: Prepared
    kept: Kept
    budgets: Sequence[float]
    plugins: Plugins
    share: Share | None = None
    tasks: TaskColumns = field(default_factory=TaskColumns)

    @property
    def config(self) -> RunConfig:
        """The resolved configuration."""
        return self.prepared.config

    @cached_property
    def session(self) -> Session:
        """The model with the backend's variants; loaded and quantized on first use."""
        return self.session_of(self.prepared)

    def session_of(self, prepared: Prepared) -> Session:
        """A prepared run's model with all variants."""
        session = Session(prepared, self.plugins, share=self.share)
        session.quantize_deployed()
        return session

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator of plans; it reads the scores of earlier processes from the cache."""
        return self.session.evaluator()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The fields of ``PlanRow`` that all rows of this cell share."""
        windows = self.prepared.game_windows
        assert windows is not None
        return problem_of(self.prepared, windows.scored_tokens)

    def windows_of(self, seed: int, count: int = 0) -> tuple[int, int] | None:
        """The first calibration window of a seed, and the one behind its last; those of different seeds are disjoint.
        None if the text has no more.

        Args:
            seed: number of the text.
            count: of windows; 0 for those of the game.
        """
        assert self.prepared.calibration is not None
        count = count or self.config.game_windows
        return (seed * count, (seed + 1) * count) if (seed + 1) * count <= len(self.prepared.calibration.ids) else None

    def facts_of(self, method: Method, seed: int) -> dict[str, Any]:
        """The fields of ``PlanRow`` that the rows of a method and a seed share."""
        search, text = self.windows_of(seed, method.windows), self.prepared.shuffled
        assert text is not None
        return {**self.facts, "read": text.part(*search).digest if search and method.reads_text else ""}

    @contextmanager
    def playing(self, session: Session, search: tuple[int, int], budget_bytes: int | None = None) -> (
            Iterator[ModelGame]):
        """The game with its probe on some calibration windows; what a process measured before is read from its log."""
        prepared = replace(session.prepared, search=search)
        folder = self.kept.path.with_suffix("") / prepared.slopes_key.digest
        folder.mkdir(parents=True, exist_ok=True)
        with session.with_prepared(prepared).playing(RunFolder(folder)) as (game, _):
            assert game is not None
            game.budget_bytes = budget_bytes
            yield game

    def uniforms(self) -> None:
        """The uniform models, and the unquantized one."""
        space, everyone = self.prepared.space, self.prepared.space.everyone
        widths_measured = [choice.bits for choice in (*space.choices, *(choice for choice, _ in self.prepared.between))]
        if not self.kept.missing(self.facts, UNIFORM, 0, widths_measured) and not self.kept.missing(
                self.facts, UNQUANTIZED, 0, [16.0]):
            return
        facts = {**self.facts, "seed": 0, "forwards": 0.0}
        linears = sum(len(layer.linears) for layer in everyone)
        widths = {choice: (k,) * linears for k, choice in enumerate(space.choices)}
        menu = [(choice, space.bytes_of(space.uniform(k))) for k, choice in enumerate(space.choices)]
        sizes = sorted([*menu, *self.prepared.between], key=lambda item: item[1])
        pinned = [pin.choice for pin in space.pinned]
        *scores, exact = self.evaluator.scores([*([choice] * len(space) + pinned for choice, _ in sizes),
                                                [None] * len(everyone)])
        rows = [PlanRow(**facts, method=UNIFORM, budget=choice.bits, budget_bytes=nbytes, nbytes=nbytes,
                        nll=score.window_nll, kl=divergences(score), widths=widths.get(choice, ()))
                for (choice, nbytes), score in zip(sizes, scores, strict=True)]
        nbytes = 2 * sum(layer.parameters for layer in everyone)
        self.add([*rows, PlanRow(**facts, method=UNQUANTIZED, budget=16.0, budget_bytes=nbytes, nbytes=nbytes,
                                 nll=exact.window_nll, kl=divergences(exact))])

    def references(self) -> None:
        """Plans without an estimate: blocks at both ends at the widest choice, and random draws."""
        space = self.prepared.space
        for label, draws in REFERENCES.items():
            for draw in range(draws):
                plans = {}
                for budget in self.kept.missing(self.facts, label, draw, self.budgets):
                    nbytes = Budget.nominal(budget).resolve(space)
                    rng = np.random.default_rng([draw, round(1000 * budget)])
                    pick = random_plan(space, nbytes, rng) if label == "random" else first_last_high(space, nbytes)
                    plans[budget] = Plan(space, pick, nbytes)
                self.score(plans, self.facts, label, draw, 0.0)

    def estimated(self, method: Method, seed: int) -> None:
        """The plans of a method at all budgets, if the text has windows for the seed."""
        budgets = self.kept.missing(self.facts_of(method, seed), method.label, seed, self.budgets)
        search = self.windows_of(seed, method.windows)
        if not budgets or (seed and not method.reads_text):
            return
        if search is None:
            print(f"{method.label}: the calibration text has no windows for seed {seed}", flush=True)
            return
        config = method.applied(self.config)
        with self.playing(self.session, search) as game:
            estimate, _ = Parts.build(config, self.plugins).estimate(game, game.probe, np.random.default_rng(seed))
        self.plan(method, estimate, budgets, seed)

    def measured(self, session: Session, method: Method, seed: int) -> Measurements:
        """The losses that a method measures with the variants of a session."""
        search = self.windows_of(seed, method.windows)
        assert search is not None
        with self.playing(session, search) as game:
            found = Parts.build(method.applied(session.prepared.config), self.plugins).measure(
                game, game.probe, np.random.default_rng(seed))
        assert isinstance(found, Measurements)
        return found

    def plan(self, method: Method, estimate: SensitivityEstimate, budgets: Sequence[float], seed: int) -> None:
        """Make, score and keep a method's plans from an estimate."""
        space = self.prepared.space
        allocator = Parts.build(method.applied(self.config), self.plugins).allocator
        found = estimate.on(space)
        plans = {budget: allocator.allocate(found, Budget.nominal(budget).resolve(space)) for budget in budgets}
        self.score(plans, self.facts_of(method, seed), method.label, seed, estimate.forwards)

    def score(self, plans: Mapping[float, Plan], facts: Mapping[str, Any], label: str, seed: int,
              forwards: float) -> None:
        """Score and keep plans by their budgets; the other arguments are of ``PlanRow``."""
        if plans:
            scores = self.evaluator.scores([plan.space.assignment(plan.pick) for plan in plans.values()])
            self.add([PlanRow.of(facts, plan, score, budget, label, seed, forwards)
                      for (budget, plan), score in zip(plans.items(), scores, strict=True)])

    def add(self, rows: Sequence[PlanRow]) -> None:
        """Keep rows, and print them."""
        self.kept.add(rows)
        for row in rows:
            print(f"{row.model}, {row.backend}, {row.granularity}, {row.budget:g} bits, {row.method}, seed {row.seed}: "
                  f"{row.nll.mean():.4f} for {row.forwards:.0f} forwards", flush=True)

    @property
    def own_rows(self) -> list[PlanRow]:
        """The rows of this cell."""
        return [row for row in self.kept.rows if all(getattr(row, name) == self.facts[name] for name in (
            "model", "backend", "variants", "text", "granularity", "menu"))]

    def ask(self) -> None:
        """Ask the model of each row the tasks that it was not asked."""
        for row in self.own_rows:
            if missing := self.tasks.missing(row):
                values = self.tasks.measure(self.session, self.assignment(row), missing)
                self.kept.add([replace(row, tasks={**row.tasks, **values})])
                print(f"{row.method}, {row.budget:g} bits, seed {row.seed}: " + ", ".join(
                    f"{name} {np.mean(documents):.3f}" for name, documents in values.items()), flush=True)

    def pick(self, row: PlanRow) -> IntArray:
        """The pick of a row of this cell."""
        space = self.prepared.space
        names = sorted(linear.name for layer in space.everyone for linear in layer.linears)
        widths = dict(zip(names, row.widths, strict=True))
        return np.array([widths[layer.linears[0].name] for layer in space.layers], dtype=np.int64)

    def assignment(self, row: PlanRow) -> Assignment:
        """The choice of each layer in a row of this cell."""
        space = self.prepared.space
        if row.method == UNQUANTIZED:
            return [None] * len(space.everyone)
        if row.method == UNIFORM and not row.widths:
            [choice] = [choice for choice, _ in self.prepared.between if choice.bits == row.budget]
            return [choice] * len(space) + [pin.choice for pin in space.pinned]
        return space.assignment(self.pick(row))


SomeCell = TypeVar("SomeCell", bound=Cell)


def divergences(score: Score) -> np.ndarray:
    """KL divergence (windows,) of a score, nats per token."""
    assert score.window_kl is not None
    return score.window_kl


def add_options(parser: argparse.ArgumentParser, name: str, backends: str, windows: int, evaluation_windows: int,
                dtype: str = "auto") -> None:
    """Add the options of a benchmark that is made of cells.

    Args:
        parser: of the benchmark.
        name: of its file of rows.
        backends, windows, evaluation_windows, dtype: defaults.
    """
    add = parser.add_argument
    add("--models", default="demo", help="demo and folders of models, with , between [demo]")
    add("--backends", default=backends, help=f"with , between [{backends}]")
    add("--windows", type=int, default=windows, help=f"calibration windows of the game [{windows}]")
    add("--seeds", type=int, default=1, help="number of disjoint calibration texts [1]")
    add("--evaluation-windows", type=int, default=evaluation_windows, help=f"held-out windows [{evaluation_windows}]")
    add("--length", type=int, default=256, help="tokens of a window [256]")
    add("--calibration", default="demo", help="calibration text: demo or a file [demo]")
    add("--text", default="demo", help="held-out text: demo or a file [demo]")
    add("--tasks", default="", help="tasks for the model of each row, with , between: continuation and last-word, made "
                                    "from the held-out text, or as impq evaluate --tasks takes them [none]")
    add("--limit", type=int, default=50, help="the most documents of a task [50]")
    add("--device", default="auto", help="as impq's [auto]")
    add("--dtype", default=dtype, help=f"of the forwards [{dtype}]")
    add("--workers", default="", help="as impq's: a number, auto, or the address of a cluster [none]")
    add("--threads", type=int, default=0, help="of each process [torch's; 1 with workers]")
    add("--plugin", action="append", type=Path, default=[], help="a Python file with a plugin")
    add("--kept", type=Path, default=KEPT / f"{name}.jsonl", help=f"file of rows [kept/{name}.jsonl]")
    add("--rows", type=Path, nargs="*", default=[], help="further files of rows for the report")
    add("--report", action="store_true", help="measure nothing: write the page from the rows")


def config_of(given: argparse.Namespace, calibration_windows: int, **settings: Any) -> RunConfig:
    """The configuration of a cell: the options of ``add_options``, and further settings.

    Args:
        given: the command line.
        calibration_windows: in the whole calibration text.
        settings: of ``RunConfig``.
    """
    return RunConfig(
        tracking_uri="none", device=given.device, dtype=given.dtype, game_windows=given.windows, workers=given.workers,
        threads=given.threads, fallback="no", sequential="no",
        calibration=TextConfig(given.calibration, calibration_windows, given.length),
        evaluation=TextConfig(given.text, given.evaluation_windows, given.length), **settings)


def plugins_of(given: argparse.Namespace) -> Plugins:
    """The plugins of the command line, with a printer of the progress."""
    plugins = Plugins(given.plugin)
    plugins.watch(Printer())
    return plugins


@contextmanager
def cells_of(kind: type[SomeCell], given: argparse.Namespace, configs: Sequence[RunConfig], budgets: Sequence[float],
             plugins: Plugins) -> Iterator[Iterator[SomeCell]]:
    """The cells of a benchmark, one after the other, with one set of workers for all of them.

    Raises:
        UsageError, ImpqError: a word of the command line is wrong; raised before a model is loaded.
    """
    if given.seeds < 1:
        raise UsageError("--seeds takes a number from 1 on")
    tasks = TaskColumns.read(given.tasks, given.limit, given.text, given.kept.parent / "tasks")
    every = [prepare(config, plugins) for config in configs]
    for prepared in every:
        prepared.require_text()
        for budget in budgets:
            Budget.nominal(budget).resolve(prepared.space)
    kept = Kept(given.kept)
    with workers_of(every[0].config, plugins, NO_TRUST) as share:
        yield (kind(prepared, kept, budgets, plugins, share, tasks) for prepared in every)


def exit_code(work: Callable[[], None]) -> int:
    """Do the work of a benchmark; an error that the user can correct is printed in one line. Returns the exit code."""
    try:
        work()
    except ImpqError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
