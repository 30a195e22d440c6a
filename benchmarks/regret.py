"""The best plan that anything found, for each model, backend and budget, and the distance of every method to it.

Reads the rows that all benchmarks keep (``rows.PlanRow``), and measures some methods of its own: those of
``--methods``, and any that ``--add`` or ``--estimator`` names, from an installed package or a ``--plugin`` file.
``--report`` measures nothing. Writes results/regret.md and results/regret.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cells import Cell, Method, add_texts
from common import RESULTS, write
from regret_report import best_within, draw, report
from rows import KEPT, Kept, PlanRow, read_rows

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError, UsageError, nearest
from impq_core.parts import Parts, assign_options
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import REFINE_STREAM
from impq_core.space import IntArray
from impq_core.types import Plan

BUDGETS = "2.5,3,3.5"
MENUS = {"quanto": ("2", "4")}
DEFAULT_MENU = ("2", "3", "4")
METHODS = {name: Method(name, name) for name in (
    "guided-output", "aumann-shapley", "fisher", "llm-mq", "hawq", "isolated")} | {
    name: Method(name, name, reads_text=False) for name in ("kurtosis", "zscore")}
"""The methods of ``--methods``."""


@dataclass(frozen=True, eq=False)
class RegretCell(Cell):
    """A model, backend and granularity, with a refinement of the best plans."""

    def refine(self, forwards: int, seed: int = 0) -> None:
        """Measure plans near the best known one of each budget, until a number of forwards is spent.

        The best plan is that of this granularity's own rows, whatever the held-out text says against the calibration
        text, on which the refinement decides. Each row costs what its plan did, and the refinement.
        """
        label = f"swaps, {forwards} forwards from the best"
        space, config = self.prepared.space, self.config
        rows = [row for row in self.kept.rows if row.problem == self._problem
                and row.granularity == self.facts["granularity"] and row.menu == self.facts["menu"] and row.widths]
        for budget in self.kept.missing(self.facts, label, seed, self.budgets):
            best = best_within(rows, Budget.nominal(budget).resolve(space))
            if best is None:
                continue
            plan = Plan(space, self._pick(best), Budget.nominal(budget).resolve(space), method=best.method)
            refining = replace(config, refiner="swaps", refine=forwards)
            refiner = Parts.build(refining, self.bench.session.plugins).refiner
            assert refiner is not None
            count = config.game_windows
            text, referee = self.text(seed), self.prepared.calibration
            assert referee is not None
            games = [self.bench.game(config, plan.budget_bytes, text=windows)
                     for windows in (text, referee.part(len(referee.ids) - count, len(referee.ids)))]
            better = refiner.refine(plan, None, *games, float(forwards), np.random.default_rng([seed, *REFINE_STREAM]))
            spent = sum(game.forwards for game in games)
            self.score({budget: better}, label, seed, best.forwards + spent)

    @property
    def _problem(self) -> tuple[str, ...]:
        return tuple(self.facts[name] for name in ("model", "backend", "variants", "text"))

    def _pick(self, row: PlanRow) -> IntArray:
        """The pick of a row of this menu and granularity."""
        space = self.prepared.space
        names = sorted(linear.name for layer in space.everyone for linear in layer.linears)
        widths = dict(zip(names, row.widths, strict=True))
        return np.array([widths[layer.linears[0].name] for layer in space.layers], dtype=np.int64)


def added(words: Sequence[str], estimators: Sequence[str], config: RunConfig, plugins: Plugins) -> list[Method]:
    """The methods of ``--add`` and ``--estimator``.

    Raises:
        UsageError: a word has another form, or an estimator, allocator or option is unknown.
    """
    found = []
    for word in [*words, *(f"{name}={name}" for name in estimators)]:
        label, equals, parts = word.partition("=")
        estimator, allocator, *options = [*parts.split(":"), "qp"] if ":" not in parts else parts.split(":")
        if not label or not equals or not estimator or not allocator or not all("=" in option for option in options):
            raise UsageError(f"--add {word}: the form is NAME=ESTIMATOR, NAME=ESTIMATOR:ALLOCATOR or "
                             "NAME=ESTIMATOR:ALLOCATOR:OPTION=VALUE:...")
        if label in METHODS and parts != label:
            raise UsageError(f"--add {word}: '{label}' is the name of one of the benchmark's own methods")
        given = replace(config, estimator=estimator, allocator=allocator)
        pairs = dict(option.split("=", 1) for option in options)
        method = Method(label, estimator, allocator, assign_options(given, plugins, pairs))
        Parts.build(method.applied(config), plugins)
        found.append(method)
    return found


def cell_of(given: argparse.Namespace, kept: Kept, model: str, backend: str, granularity: str) -> RegretCell:
    budgets = tuple(float(budget) for budget in given.budgets.split(","))
    config = RunConfig(
        tracking_uri="none", model=model, backend=backend, bits=MENUS.get(backend, DEFAULT_MENU),
        granularity=granularity, estimator="isolated", device=given.device, game_windows=given.windows,
        calibration=TextConfig(given.calibration, max(64, given.windows * (given.seeds + 1)), given.length),
        evaluation=TextConfig(given.text, given.evaluation_windows, given.length))
    return RegretCell(config, kept, budgets, tuple(given.plugin))


def measure(given: argparse.Namespace) -> None:
    """Measure what is missing of the methods on the command line.

    Raises:
        UsageError, ImpqError: a word is wrong; raised before the first model is loaded.
    """
    if given.seeds < 1:
        raise UsageError("--seeds takes a number from 1 on")
    plugins = Plugins(given.plugin)
    names = [name for name in given.methods.split(",") if name]
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--methods: this benchmark has no method '{name}'{nearest(name, METHODS)}; --estimator "
                             "takes any estimator")
    try:
        [float(budget) for budget in given.budgets.split(",")]
    except ValueError:
        raise UsageError(f"--budgets {given.budgets}: numbers of bits with , between") from None
    places = [(model, backend, granularity) for model in given.models.split(",")
              for backend in given.backends.split(",") for granularity in given.granularities.split(",")]
    kept = Kept(given.kept)
    cells = [cell_of(given, kept, *place) for place in places]
    methods = [METHODS[name] for name in names] + added(given.add, given.estimator, cells[0].config, plugins)
    for cell in cells:
        for budget in cell.budgets:
            Budget.nominal(budget).resolve(cell.prepared.space)
    for cell in cells:
        cell.uniforms()
        cell.references()
        for seed in range(given.seeds):
            for method in methods:
                cell.estimated(method, seed)
        if given.refine:
            cell.refine(given.refine)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo", help="demo and folders of models, with , between [demo]")
    parser.add_argument("--backends", default="hqq", help="with , between [hqq]")
    parser.add_argument("--granularities", default="group", help="with , between [group]")
    parser.add_argument("--budgets", default=BUDGETS, help=f"nominal bits, with , between [{BUDGETS}]")
    parser.add_argument("--methods", default=",".join(METHODS), help="of this benchmark [all]; empty for none")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=ESTIMATOR[:ALLOCATOR[:OPTION=VALUE...]]",
                        help="a method of your own")
    parser.add_argument("--estimator", action="append", default=[], help="the same, by an estimator's name alone")
    parser.add_argument("--plugin", action="append", type=Path, default=[], help="a Python file with a plugin")
    parser.add_argument("--refine", type=int, default=60, help="forwards of the refinement of the best plan [60]")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of every method [4]")
    add_texts(parser, evaluation_windows=16)
    parser.add_argument("--kept", type=Path, default=KEPT / "regret.jsonl", help="file of rows [kept/regret.jsonl]")
    parser.add_argument("--rows", type=Path, nargs="*", default=[], help="files of rows of other benchmarks")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    given = parser.parse_args(words)
    try:
        if not given.report:
            measure(given)
        rows = read_rows([given.kept, *given.rows])
        if not rows:
            raise ImpqError(f"{given.kept} has no rows: leave out --report, and they are measured")
        draw(rows, RESULTS / "regret.png")
        write("regret.md", report(rows))
    except ImpqError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
