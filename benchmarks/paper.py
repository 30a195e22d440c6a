"""The protocol of CoopQ (arXiv 2509.15455): decoder blocks at 2 or 4 bits, SPQE measured with Quanto and with the
deployed backend, beside the paper's baselines and references of the same bytes.

Rows are kept as JSON lines (``--kept``), each on disk before the next is measured, and every measured loss in a folder
beside the file. A stopped benchmark continues; several processes may measure backends at once, each into a file of its
own in the same folder. ``--report`` writes results/paper.md from the kept rows, without a model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from common import Bench, write
from paper_report import report
from rows import KEPT, UNIFORM, Kept, PlanRow, problem_of, read_rows, variants_of

from impq_core.budget import Budget
from impq_core.config import RunConfig, TextConfig
from impq_core.errors import ImpqError, UsageError
from impq_core.ledger import MeasurementLog
from impq_core.model.text import Windows
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.references import first_last_high, random_plan
from impq_core.results import Score
from impq_core.runs.prepare import Prepared, prepare
from impq_core.types import Measurements, Plan, SensitivityEstimate

MENU = ("2", "4")
BUDGETS = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75)
PROXY = "quanto"
"""The backend that the paper measures with."""

SAMPLED = {"antithetic": False, "fresh": False}
RANDOM_PLANS = 3


@dataclass(frozen=True)
class Method:
    """An estimator that is not SPQE.

    Args:
        label: its name in the tables.
        estimator: its name.
        options: its options.
        reads_text: whether its estimate depends on the calibration text, and so on the seed.
    """

    label: str
    estimator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reads_text: bool = True


BASELINES = (
    Method("Z-score, more outliers", "zscore", {"direction": "more"}, False),
    Method("Z-score, fewer outliers", "zscore", {"direction": "fewer"}, False),
    Method("LIM", "lim"),
    Method("LLM-MQ", "llm-mq"),
    Method("Activation", "activation"),
)
"""The baselines of the paper. It says that blocks with more outlying weights are more important; the original
(arXiv 2406.17415) says fewer."""

OURS = (Method("impq's default estimator", RunConfig().estimator),)


@dataclass(frozen=True, eq=False)
class Cell:
    """A model and a deployed backend.

    Args:
        config: with the deployed backend.
        kept: where rows go.
        seeds: number of calibration texts.
    """

    config: RunConfig
    kept: Kept
    seeds: int

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.config, Plugins())

    @cached_property
    def bench(self) -> Bench:
        """The model with the deployed backend's variants."""
        return Bench.build(self.config)

    @cached_property
    def proxy(self) -> Bench:
        """The model with Quanto's variants."""
        return Bench.build(replace(self.config, backend=PROXY))

    @cached_property
    def facts(self) -> dict[str, Any]:
        return problem_of(self.prepared, self.text(0).scored_tokens)

    def text(self, seed: int) -> Windows:
        """The calibration windows of a seed; those of different seeds are disjoint."""
        assert self.prepared.calibration is not None
        count = self.config.game_windows
        return self.prepared.calibration.part(seed * count, (seed + 1) * count)

    def measure(self, permutations: int) -> None:
        """Measure all rows that are missing, the most informative first."""
        self.uniforms()
        self.references()
        for seed in range(self.seeds):
            for method in BASELINES:
                self.estimated(method, seed)
            self.sampled(self.config.backend, seed, permutations)
            for method in OURS:
                self.estimated(method, seed)
            if self.config.backend != PROXY:
                self.sampled(PROXY, seed, permutations)

    def uniforms(self) -> None:
        widths = [choice.bits for choice in self.prepared.space.choices]
        if not self.kept.missing(self.facts, UNIFORM, 0, widths):
            return
        bits = {choice.name: choice.bits for choice, _ in self.prepared.between} | {
            choice.name: choice.bits for choice in self.prepared.space.choices}
        facts = {**self.facts, "method": UNIFORM, "seed": 0, "forwards": 0.0}
        rows = [PlanRow(**facts, budget=bits[name.removeprefix("uniform ")], nbytes=nbytes, nll=score.window_nll,
                        kl=_divergences(score)) for name, nbytes, score in self.bench.uniforms()]
        unquantized = self.bench.evaluator.score([None] * len(self.prepared.space.everyone))
        parameters = sum(layer.parameters for layer in self.prepared.space.everyone)
        rows.append(PlanRow(**{**facts, "method": "unquantized"}, budget=16.0, nbytes=2 * parameters,
                            nll=unquantized.window_nll, kl=_divergences(unquantized)))
        self._add(rows)

    def references(self) -> None:
        """Plans without an estimate."""
        space = self.prepared.space
        for label, draws in (("first/last high", 1), ("random", RANDOM_PLANS)):
            for draw in range(draws):
                plans = {}
                for budget in self.kept.missing(self.facts, label, draw, BUDGETS):
                    nbytes = Budget.nominal(budget).resolve(space)
                    pick = (random_plan(space, nbytes, np.random.default_rng([draw, round(100 * budget)]))
                            if label == "random" else first_last_high(space, nbytes))
                    plans[budget] = Plan(space, pick, nbytes)
                self._score(plans, label, draw, 0.0)

    def estimated(self, method: Method, seed: int) -> None:
        """The rows of an estimator that needs no surrogate."""
        if seed and not method.reads_text:
            return
        budgets = self.kept.missing(self.facts, method.label, seed, BUDGETS)
        if not budgets:
            return
        config = replace(self.config, estimator=method.estimator, options={"estimator": dict(method.options)})
        game = self.bench.game(config, text=self.text(seed))
        estimate, _ = Parts.build(config, self.bench.session.plugins).estimate(
            game, game.probe, np.random.default_rng(seed))
        self._plan(estimate, budgets, method.label, seed)

    def sampled(self, measured: str, seed: int, permutations: int) -> None:
        """The rows of SPQE with the paper's covariance, from a growing number of permutations."""
        name = "measured with Quanto" if measured == PROXY else "measured as deployed"
        for count in sorted({max(2, permutations // 5), max(2, permutations // 2), permutations}):
            label = f"CoopQ, {count} permutations, {name}"
            budgets = self.kept.missing(self.facts, label, seed, BUDGETS)
            if budgets:
                losses = self.losses(measured, seed, count)
                config = replace(self.config, surrogate="covariance")
                surrogate = Parts.build(config, self.bench.session.plugins).surrogate
                self._plan(surrogate.fit(losses), budgets, label, seed)

    def losses(self, measured: str, seed: int, count: int) -> Measurements:
        """SPQE's losses of some permutations, read if a process has measured them."""
        prepared = self.prepared if measured == self.config.backend else prepare(
            replace(self.config, backend=measured), Plugins())
        text = self.text(seed)
        facts = [self.facts["model"], measured, variants_of(prepared), MENU, text.digest, seed]
        stem = self.folder / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        path = stem.with_name(f"{stem.name}-{count}.npz")
        if not path.exists():
            bench = self.bench if measured == self.config.backend else self.proxy
            config = replace(self.config, options={"estimator": {**SAMPLED, "permutations": count}})
            key = prepared.losses_key(prepared.game_space, text)
            # Another process may measure the same: the name of the log has this one's backend.
            with closing(MeasurementLog(stem.with_name(f"{stem.name}-for-{self.config.backend}.jsonl"), key)) as log:
                game = bench.game(config, text=text, log=log)
                result = Parts.build(config, bench.session.plugins).measure(
                    game, game.probe, np.random.default_rng(seed))
            assert isinstance(result, Measurements)
            result.save(path)
        return Measurements.load(path)

    @property
    def folder(self) -> Path:
        """Where losses are kept: beside the rows."""
        folder = self.kept.path.parent / "paper-losses"
        folder.mkdir(exist_ok=True)
        return folder

    def _plan(self, estimate: SensitivityEstimate, budgets: Sequence[float], label: str, seed: int) -> None:
        estimate = estimate.on(self.prepared.space)
        plans = {budget: self.bench.plan(self.config, estimate, budget) for budget in budgets}
        self._score(plans, label, seed, estimate.forwards)

    def _score(self, plans: Mapping[float, Plan], label: str, seed: int, forwards: float) -> None:
        if plans:
            scores = self.bench.evaluator.scores([plan.space.assignment(plan.pick) for plan in plans.values()])
            self._add([PlanRow.of(self.facts, plan, score, budget, label, seed, forwards)
                       for (budget, plan), score in zip(plans.items(), scores, strict=True)])

    def _add(self, rows: Sequence[PlanRow]) -> None:
        self.kept.add(rows)
        for row in rows:
            print(f"{row.model}, {row.backend}, {row.budget:g} bits, {row.method}, seed {row.seed}: "
                  f"{row.nll.mean():.4f}", flush=True)


def _divergences(score: Score) -> np.ndarray:
    assert score.window_kl is not None
    return score.window_kl


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    """The cells of the command line; everything that a word can break is checked before the first is measured."""
    if given.permutations < 2:
        raise UsageError("--permutations takes a number from 2 on: a covariance needs two")
    if given.seeds < 1:
        raise UsageError("--seeds takes a number from 1 on")
    configs = []
    for model in given.models.split(","):
        for backend in given.backends.split(","):
            config = RunConfig(
                tracking_uri="none", model=model, backend=backend, bits=MENU, granularity="block", estimator="spqe",
                device=given.device, dtype=given.dtype, game_windows=given.windows,
                calibration=TextConfig(given.calibration, max(64, given.windows * given.seeds), given.length),
                evaluation=TextConfig(given.text, given.evaluation_windows, given.length),
                options={"estimator": {**SAMPLED, "permutations": given.permutations}})
            prepare(config, Plugins())
            configs.append(config)
    kept = Kept(given.kept[0])
    for config in configs:
        yield Cell(config, kept, given.seeds)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo", help="demo and folders of models, with , between [demo]")
    parser.add_argument("--backends", default="quanto,hqq,gptq", help="with , between [quanto,hqq,gptq]")
    parser.add_argument("--permutations", type=int, default=50, help="of SPQE [50]; a fifth and half of them have rows")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of every estimator [8]")
    parser.add_argument("--seeds", type=int, default=1, help="number of disjoint calibration texts [1]")
    parser.add_argument("--evaluation-windows", type=int, default=32, help="held-out windows [32]")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window [256]")
    parser.add_argument("--calibration", default="demo", help="calibration text: demo or a file [demo]")
    parser.add_argument("--text", default="demo", help="held-out text: demo or a file [demo]")
    parser.add_argument("--device", default="auto", help="as impq's [auto]")
    parser.add_argument("--dtype", default="float32", help="of the forwards [float32]")
    parser.add_argument("--kept", type=Path, nargs="+", default=[KEPT / "paper.jsonl"],
                        help="file of rows; with --report also several [kept/paper.jsonl]")
    parser.add_argument("--report", action="store_true", help="measure nothing: write results/paper.md from the rows")
    given = parser.parse_args(words)
    try:
        if given.report:
            write("paper.md", report(read_rows(given.kept)))
            return 0
        for cell in cells(given):
            cell.measure(given.permutations)
    except ImpqError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
