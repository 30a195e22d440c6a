"""The protocol of CoopQ (arXiv 2509.15455): decoder blocks at 2 or 4 bits, SPQE measured with Quanto and with the
deployed backend, beside the paper's baselines and references of the same bytes.

A stopped benchmark continues, and ``--workers`` shares its work. ``--report`` writes results/paper.md from the kept
rows, without a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cells import Cell, Method, add_options, cells_of, config_of, exit_code, plugins_of
from common import write
from paper_report import report
from rows import read_all

from impq_core.config import RunConfig
from impq_core.errors import UsageError
from impq_core.parts import Parts
from impq_core.runs.prepare import prepare
from impq_core.runs.session import Session

MENU = ("2", "4")
BUDGETS = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75)
PROXY = "quanto"
"""The backend that the paper measures with."""

SAMPLED = {"antithetic": False, "fresh": False}
BASELINES = (
    Method("Z-score, more outliers", "zscore", options={"estimator": {"direction": "more"}}, reads_text=False),
    Method("Z-score, fewer outliers", "zscore", options={"estimator": {"direction": "fewer"}}, reads_text=False),
    Method("LIM", "lim"),
    Method("LLM-MQ", "llm-mq"),
    Method("Activation", "activation"),
)
"""The baselines of the paper. It says that blocks with more outlying weights are more important; the original
(arXiv 2406.17415) says fewer."""

OURS = tuple(Method(f"impq: {name}", name) for name in dict.fromkeys((RunConfig().estimator, "aumann-shapley")))


@dataclass(frozen=True, eq=False)
class PaperCell(Cell):
    """A model and a deployed backend, under CoopQ's protocol."""

    @cached_property
    def proxy(self) -> Session:
        """The model with Quanto's variants."""
        return self.session_of(prepare(replace(self.config, backend=PROXY, options={}), self.plugins))

    def measure(self, permutations: int, seeds: int) -> None:
        """Measure all rows that are missing, the most informative first."""
        self.uniforms()
        self.references()
        for seed in range(seeds):
            for method in BASELINES:
                self.estimated(method, seed)
            self.sampled(self.config.backend, seed, permutations)
            for method in OURS:
                self.estimated(method, seed)
            if self.config.backend != PROXY:
                self.sampled(PROXY, seed, permutations)
        self.ask()

    def sampled(self, backend: str, seed: int, permutations: int) -> None:
        """The rows of SPQE, measured with the variants of a backend, with the paper's covariance, from a growing number
        of permutations."""
        name = "measured with Quanto" if backend == PROXY else "measured as deployed"
        for count in sorted({max(2, permutations // 5), max(2, permutations // 2), permutations}):
            method = Method(f"CoopQ, {count} permutations, {name}", "spqe", surrogate="covariance",
                            options={"estimator": {**SAMPLED, "permutations": count}})
            budgets = self.kept.missing(self.facts_of(method, seed), method.label, seed, self.budgets)
            if budgets:
                parts = Parts.build(method.applied(self.config), self.plugins)
                session = self.session if backend == self.config.backend else self.proxy
                self.plan(method, parts.surrogate.fit(self.measured(session, method, seed)), budgets, seed)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "paper", "quanto,hqq,gptq", windows=8, evaluation_windows=32, dtype="float32")
    parser.add_argument("--permutations", type=int, default=50, help="of SPQE [50]; a fifth and half of them have rows")
    given = parser.parse_args(words)

    def work() -> None:
        if given.permutations < 2:
            raise UsageError("--permutations takes a number from 2 on: a covariance needs two")
        if not given.report:
            configs = [config_of(given, max(64, given.windows * given.seeds), model=model, backend=backend, bits=MENU,
                                 granularity="block", estimator="spqe")
                       for model in given.models.split(",") for backend in given.backends.split(",")]
            with cells_of(PaperCell, given, configs, BUDGETS, plugins_of(given)) as cells:
                for cell in cells:
                    cell.measure(given.permutations, given.seeds)
        write("paper.md", report(read_all(given.kept, given.rows)))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
