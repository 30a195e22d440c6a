"""A model, a backend and a granularity. Its plans are measured, and kept as rows."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from common import Bench
from rows import UNIFORM, Kept, PlanRow, problem_of

from impq_core.budget import Budget
from impq_core.config import RunConfig
from impq_core.model.text import Windows
from impq_core.parts import Parts
from impq_core.plugins import Plugins
from impq_core.references import first_last_high, random_plan
from impq_core.results import Score
from impq_core.runs.prepare import Prepared, prepare
from impq_core.types import Plan, SensitivityEstimate

RANDOM_PLANS = 3
UNQUANTIZED = "unquantized"


@dataclass(frozen=True)
class Method:
    """A way to make plans.

    Args:
        label: its name in tables.
        estimator: name of the estimator.
        allocator: name of the allocator.
        options: options of its parts, by role.
        reads_text: whether the estimate depends on the calibration text, and so on the seed.
    """

    label: str
    estimator: str
    allocator: str = "qp"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reads_text: bool = True

    def applied(self, config: RunConfig) -> RunConfig:
        """A configuration with this method's parts and options."""
        return replace(config, estimator=self.estimator, allocator=self.allocator, options=self.options)


@dataclass(frozen=True, eq=False)
class Cell:
    """Plans for one model, backend and granularity.

    Args:
        config: its ``game_windows`` are the calibration windows of every estimator; its calibration text has as many
            for each seed, and all of it is what a backend reads that needs activations.
        kept: where rows go.
        budgets: in nominal bits.
        files: further plugins.
    """

    config: RunConfig
    kept: Kept
    budgets: Sequence[float]
    files: Sequence[Path] = ()

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.config, Plugins(self.files))

    @cached_property
    def bench(self) -> Bench:
        """The model with the backend's variants; loaded and quantized on first use."""
        return Bench.build(self.config, self.files)

    @cached_property
    def facts(self) -> dict[str, Any]:
        return problem_of(self.prepared, self.text(0).scored_tokens)

    def text(self, seed: int) -> Windows:
        """The calibration windows of a seed; those of different seeds are disjoint."""
        assert self.prepared.calibration is not None
        count = self.config.game_windows
        return self.prepared.calibration.part(seed * count, (seed + 1) * count)

    def uniforms(self) -> None:
        """The uniform models, and the unquantized one."""
        if not self.kept.missing(self.facts, UNIFORM, 0, [choice.bits for choice in self.prepared.space.choices]):
            return
        menu = [*self.prepared.space.choices, *(choice for choice, _ in self.prepared.between)]
        bits = {f"uniform {choice}": choice.bits for choice in menu}
        facts = {**self.facts, "seed": 0, "forwards": 0.0}
        everyone = self.prepared.space.everyone
        linears = sum(len(layer.linears) for layer in everyone)
        widths = {f"uniform {choice}": (k,) * linears for k, choice in enumerate(self.prepared.space.choices)}
        rows = [PlanRow(**facts, method=UNIFORM, budget=bits[name], budget_bytes=nbytes, nbytes=nbytes,
                        nll=score.window_nll, kl=divergences(score), widths=widths.get(name, ()))
                for name, nbytes, score in self.bench.uniforms()]
        score = self.bench.evaluator.score([None] * len(everyone))
        nbytes = 2 * sum(layer.parameters for layer in everyone)
        self.add([*rows, PlanRow(**facts, method=UNQUANTIZED, budget=16.0, budget_bytes=nbytes, nbytes=nbytes,
                                 nll=score.window_nll, kl=divergences(score))])

    def references(self) -> None:
        """Plans without an estimate: blocks at both ends at the widest choice, and random draws."""
        space = self.prepared.space
        for label, draws in (("first/last high", 1), ("random", RANDOM_PLANS)):
            for draw in range(draws):
                plans = {}
                for budget in self.kept.missing(self.facts, label, draw, self.budgets):
                    nbytes = Budget.nominal(budget).resolve(space)
                    rng = np.random.default_rng([draw, round(1000 * budget)])
                    pick = random_plan(space, nbytes, rng) if label == "random" else first_last_high(space, nbytes)
                    plans[budget] = Plan(space, pick, nbytes)
                self.score(plans, label, draw, 0.0)

    def estimated(self, method: Method, seed: int) -> None:
        """The plans of a method at all budgets."""
        budgets = self.kept.missing(self.facts, method.label, seed, self.budgets)
        if not budgets or (seed and not method.reads_text):
            return
        self.plan(method, self.estimate(method, seed), budgets, seed)

    def estimate(self, method: Method, seed: int) -> SensitivityEstimate:
        """The estimate of a method from the calibration windows of a seed."""
        config = method.applied(self.config)
        game = self.bench.game(config, text=self.text(seed))
        return Parts.build(config, self.bench.session.plugins).estimate(
            game, game.probe, np.random.default_rng(seed))[0]

    def plan(self, method: Method, estimate: SensitivityEstimate, budgets: Sequence[float], seed: int) -> None:
        """Make, score and keep a method's plans from an estimate."""
        found = estimate.on(self.prepared.space)
        plans = {budget: self.bench.plan(method.applied(self.config), found, budget) for budget in budgets}
        self.score(plans, method.label, seed, estimate.forwards)

    def score(self, plans: Mapping[float, Plan], label: str, seed: int, forwards: float) -> None:
        """Score and keep plans by their budgets."""
        if plans:
            scores = self.bench.evaluator.scores([plan.space.assignment(plan.pick) for plan in plans.values()])
            self.add([PlanRow.of(self.facts, plan, score, budget, label, seed, forwards)
                      for (budget, plan), score in zip(plans.items(), scores, strict=True)])

    def add(self, rows: Sequence[PlanRow]) -> None:
        """Keep rows, and print them."""
        self.kept.add(rows)
        for row in rows:
            print(f"{row.model}, {row.backend}, {row.budget:g} bits, {row.method}, seed {row.seed}: "
                  f"{row.nll.mean():.4f} for {row.forwards:.0f} forwards", flush=True)


def divergences(score: Score) -> np.ndarray:
    """KL divergence (windows,) of a score, nats per token."""
    assert score.window_kl is not None
    return score.window_kl


def add_texts(parser: argparse.ArgumentParser, evaluation_windows: int) -> None:
    """Add the options of a benchmark's texts and of its device, with that many held-out windows by default."""
    parser.add_argument("--seeds", type=int, default=1, help="number of disjoint calibration texts [1]")
    parser.add_argument("--evaluation-windows", type=int, default=evaluation_windows,
                        help=f"held-out windows [{evaluation_windows}]")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window [256]")
    parser.add_argument("--calibration", default="demo", help="calibration text: demo or a file [demo]")
    parser.add_argument("--text", default="demo", help="held-out text: demo or a file [demo]")
    parser.add_argument("--device", default="auto", help="as impq's [auto]")
