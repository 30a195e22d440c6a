"""Tests of the contract of ``Allocator``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np

from impq_core.costs import Cost, fit
from impq_core.errors import ImpqError
from impq_core.interfaces import Allocator
from impq_core.space import Pinned
from impq_core.testing.part import PartSuite
from impq_core.testing.planted import least_loss, planted_estimate, planted_space
from impq_core.types import SensitivityEstimate


class AllocatorSuite(PartSuite):
    """Tests an ``Allocator`` on random estimates that exhaustive search can solve.

    Class attributes:
        exact: whether its plans must be optimal.
    """

    part: ClassVar[type[Allocator]]
    exact: ClassVar[bool] = False

    def cases(self) -> Iterator[tuple[SensitivityEstimate, int]]:
        """Estimates of one to five layers, with and without pair terms and pins, each with budgets from the smallest to
        the largest plan."""
        rng = np.random.default_rng(0)
        for seed, (n, bits, strength, pinned) in enumerate(itertools.product(
                (1, 3, 5), ((4, 2), (4, 3, 2)), (0.0, 0.3), (False, True))):
            estimate = planted_estimate(seed, n, bits, strength)
            if pinned:
                pin = Pinned(planted_space(n + 1).layers[-1], None, 999, 999, 999)
                estimate = replace(estimate, space=replace(estimate.space, pinned=(pin,)))
            low, high = estimate.space.low_bytes, estimate.space.high_bytes
            for share in (0.0, *rng.random(2), 1.0):
                yield estimate, int(low + share * (high - low))

    def test_plans_fit_and_keep_their_promises(self) -> None:
        """A plan fits the budget, is of the estimate's space, and has the loss that the estimate predicts; a bound is
        at most the optimum."""
        for estimate, budget in self.cases():
            plan, best = self.make().allocate(estimate, budget), least_loss(estimate, budget)
            assert plan.space is estimate.space and plan.method
            assert plan.nbytes <= budget, f"{plan.nbytes} bytes do not fit in {budget}"
            predicted = float(estimate.predict(plan.pick)[0])
            assert plan.predicted_loss is not None, "the plan has no predicted_loss"
            assert np.isclose(plan.predicted_loss, predicted), (
                f"predicted_loss is {plan.predicted_loss}, but the estimate predicts {predicted}")
            assert plan.bound is None or plan.bound <= best + 1e-6, f"bound {plan.bound} exceeds the optimum {best}"
            assert not self.exact or plan.predicted_loss <= best + 1e-6, (
                f"predicted_loss is {plan.predicted_loss}, the optimum {best}")

    def test_the_scale_of_the_scores_does_not_matter(self) -> None:
        """With scores of 1e-12 and 1e12, layers without cost and equal layers, the allocator ends and plans fit."""
        for scale, (estimate, budget) in itertools.product((1e-12, 1e12), itertools.islice(self.cases(), 16, 48)):
            linear = estimate.linear.copy()
            linear[-1], linear[len(linear) // 2] = 0.0, linear[0]
            pairs = None if estimate.pairwise is None else scale * estimate.pairwise
            plain = replace(estimate, linear=linear)
            plan = self.make().allocate(replace(estimate, linear=scale * linear, pairwise=pairs), budget)
            assert plan.nbytes <= budget, f"{plan.nbytes} bytes do not fit in {budget}"
            excess = float(plain.predict(plan.pick)[0]) - least_loss(plain, budget)
            assert not self.exact or excess <= 1e-6, f"{excess:.3g} above the optimum, for scores times {scale:g}"

    def test_the_same_estimate_makes_the_same_plan(self) -> None:
        """Two plans from one estimate are equal, also if there are ties."""
        for estimate, budget in itertools.islice(self.cases(), 0, None, 5):
            picks = [self.make().allocate(estimate, budget).pick for _ in range(2)]
            assert np.array_equal(*picks), "two plans from one estimate differ"

    def test_plans_keep_limits(self) -> None:
        """Plans of an allocator that takes limits keep them, are optimal among the plans that do if the allocator is
        exact, and have bounds below the optimum; if no plan keeps them, that is an ImpqError."""
        if not self.part.takes_limits:
            return
        rng = np.random.default_rng(1)
        for estimate, budget in itertools.islice(self.cases(), 0, None, 3):
            n, m = estimate.space.nbytes.shape
            picks = np.array(list(itertools.product(range(m), repeat=n)))
            limits = []
            for number in range(2):
                cost = Cost(f"cost{number}", "ms", "planted", rng.random((n, m)), fixed=0.1)
                limit = float(np.quantile(cost.of_all(picks), rng.uniform(0.1, 1)))
                limits.append(replace(cost, limit=limit))
            fitting = picks[fit(estimate.space, picks, budget, limits)]
            try:
                plan = self.make().allocate(estimate, budget, limits)
            except ImpqError:
                assert not len(fitting), "plans within budget and limits exist, but none was found"
                continue
            assert fit(estimate.space, plan.pick[None], budget, limits)[0], "a plan exceeds a limit or the budget"
            best = float(estimate.predict(fitting).min())
            assert plan.predicted_loss is not None
            assert plan.bound is None or plan.bound <= best + 1e-6, f"bound {plan.bound} exceeds the optimum {best}"
            assert not self.exact or plan.predicted_loss <= best + 1e-6, (
                f"predicted_loss is {plan.predicted_loss}, the optimum within limits {best}")

    def test_a_budget_below_everything_is_refused(self) -> None:
        """A budget below the smallest plan is an ImpqError."""
        estimate = planted_estimate(0, 4, (4, 2), 0.1)
        try:
            self.make().allocate(estimate, estimate.space.low_bytes - 1)
        except ImpqError:
            return
        raise AssertionError("a budget below the smallest plan was accepted")
