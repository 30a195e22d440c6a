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

import numpy as np
from cells import REFERENCES, Cell, Method, add_options, cells_of, config_of, exit_code, plugins_of
from common import RESULTS, write
from regret_report import best_within, draw, report
from rows import LINE, UNIFORM, UNQUANTIZED, read_all

from impq_core.budget import Budget
from impq_core.config import RunConfig
from impq_core.errors import UsageError, nearest
from impq_core.parts import Parts, assign_options
from impq_core.plugins import Plugins
from impq_core.runs.pipeline import REFINE_STREAM
from impq_core.types import Plan

BUDGETS = "2.5,3,3.5"
REFINED = "swaps, "
"""How names of refined plans begin."""

MENUS = {"quanto": ("2", "4")}
DEFAULT_MENU = ("2", "3", "4")
METHODS = {name: Method(name, name) for name in (
    "guided-output", "aumann-shapley", "fisher", "llm-mq", "hawq", "isolated")} | {
    name: Method(name, name, reads_text=False) for name in ("kurtosis", "zscore")}
"""The methods of ``--methods``."""

RESERVED = (UNIFORM, UNQUANTIZED, LINE, *REFERENCES)
"""Names of rows that are no estimator's."""


@dataclass(frozen=True, eq=False)
class RegretCell(Cell):
    """A model, backend and granularity, with a refinement of the best plans."""

    def refine(self, forwards: int, seed: int = 0) -> None:
        """Measure plans near the best known one of each budget, until a number of forwards is spent.

        The best plan is that of this granularity's own rows, whatever the held-out text says against the calibration
        text, on which the refinement decides. Each row costs what its plan did, and the refinement.
        """
        label, space = f"{REFINED}{forwards} forwards from the best", self.prepared.space
        rows = [row for row in self.own_rows if row.widths and not row.method.startswith(REFINED)]
        count, end = self.config.game_windows, self.config.calibration.windows
        search, text = self.windows_of(seed), self.prepared.shuffled
        assert search is not None and text is not None
        windows = [search, (end - count, end)]
        for budget in self.budgets:
            nbytes = Budget.nominal(budget).resolve(space)
            best = best_within(rows, nbytes)
            if best is None:
                continue
            facts = {**self.facts, "read": " ".join([*(text.part(*part).digest for part in windows),
                                                     f"from {''.join(map(str, best.widths))}"])}
            if not self.kept.missing(facts, label, seed, [budget]):
                continue
            refining = replace(self.config, refiner="swaps", refine=forwards, options={})
            refiner = Parts.build(refining, self.plugins).refiner
            assert refiner is not None
            with self.playing(self.session, windows[0], nbytes) as game, \
                    self.playing(self.session, windows[1], nbytes) as referee:
                better = refiner.refine(Plan(space, self.pick(best), nbytes, method=best.method), None, game, referee,
                                        float(forwards), np.random.default_rng([seed, *REFINE_STREAM]))
                spent = game.forwards + referee.forwards
            self.score({budget: better}, facts, label, seed,
                       best.forwards * best.tokens / self.facts["tokens"] + spent)


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
        if (label in METHODS and parts != label) or label in RESERVED or label.startswith(REFINED):
            raise UsageError(f"--add {word}: '{label}' is a name of the benchmark's own: give --add "
                             f"my-{label}={parts}")
        pairs = dict(option.split("=", 1) for option in options)
        given = replace(config, estimator=estimator, allocator=allocator,
                        surrogate=pairs.pop("surrogate", config.surrogate))
        method = Method(label, estimator, allocator, given.surrogate, assign_options(given, plugins, pairs))
        Parts.build(method.applied(config), plugins)
        found.append(method)
    return found


def measure(given: argparse.Namespace) -> None:
    """Measure what is missing of the methods on the command line.

    Raises:
        UsageError, ImpqError: a word is wrong; raised before the first model is loaded.
    """
    plugins = plugins_of(given)
    names = [name for name in given.methods.split(",") if name]
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--methods: this benchmark has no method '{name}'{nearest(name, METHODS)}; --estimator "
                             "takes any estimator")
    try:
        budgets = [float(budget) for budget in given.budgets.split(",")]
    except ValueError:
        raise UsageError(f"--budgets {given.budgets}: numbers of bits with , between") from None
    configs = [config_of(given, max(64, given.windows * (given.seeds + 1)), model=model, backend=backend,
                         bits=tuple(given.bits.split(",")) if given.bits else MENUS.get(backend, DEFAULT_MENU),
                         granularity=granularity, estimator="isolated")
               for model in given.models.split(",") for backend in given.backends.split(",")
               for granularity in given.granularities.split(",")]
    methods = [METHODS[name] for name in names] + added(given.add, given.estimator, configs[0], plugins)
    with cells_of(RegretCell, given, configs, budgets, plugins) as cells:
        for cell in cells:
            cell.uniforms()
            cell.references()
            for seed in range(given.seeds):
                for method in methods:
                    cell.estimated(method, seed)
            if given.refine:
                cell.refine(given.refine)
            cell.ask()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "regret", "hqq", windows=4, evaluation_windows=16)
    parser.add_argument("--granularities", default="group", help="with , between [group]")
    parser.add_argument("--bits", default="", help="the menu, with , between [2,3,4; 2,4 with quanto]")
    parser.add_argument("--budgets", default=BUDGETS, help=f"nominal bits, with , between [{BUDGETS}]")
    parser.add_argument("--methods", default=",".join(METHODS), help="of this benchmark [all]; empty for none")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=ESTIMATOR[:ALLOCATOR[:OPTION=VALUE...]]",
                        help="a method of your own; surrogate=NAME is an option, too")
    parser.add_argument("--estimator", action="append", default=[], help="the same, by an estimator's name alone")
    parser.add_argument("--refine", type=int, default=60, help="forwards of the refinement of the best plan [60]")
    given = parser.parse_args(words)

    def work() -> None:
        if not given.report:
            measure(given)
        rows = read_all(given.kept, given.rows)
        draw(rows, RESULTS / "regret.png")
        write("regret.md", report(rows))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
