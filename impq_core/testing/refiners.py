"""Tests of the contract of ``Refiner``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from impq_core.costs import Cost
from impq_core.interfaces import Refiner
from impq_core.references import random_plan
from impq_core.space import FloatArray, IntArray
from impq_core.testing.part import PartSuite
from impq_core.testing.planted import PlantedGame, least_loss, planted_estimate, planted_loss
from impq_core.types import Plan, SensitivityEstimate

SLACK = 20
"""Evaluations by which the last round may exceed the limit."""


class RefinerSuite(PartSuite):
    """Tests a ``Refiner`` from a random plan of a planted game of ten layers with pair terms.

    Class attributes:
        enough: forwards that suffice for a plan near the optimum.
    """

    part: ClassVar[type[Refiner]]
    enough: ClassVar[float] = 1500

    def refine(self, estimate: SensitivityEstimate | None, game: PlantedGame, referee: PlantedGame,
               forwards: float) -> tuple[Plan, Plan]:
        """The plan before and after."""
        space = game.space
        budget = (space.low_bytes + space.high_bytes) // 2
        start = Plan(space, random_plan(space, budget, np.random.default_rng(0)), budget, method="random")
        return start, self.make().refine(start, estimate, game, referee, forwards, np.random.default_rng(1))

    def games(self, noise: float = 0.0) -> tuple[SensitivityEstimate, PlantedGame, PlantedGame]:
        """The true costs, and a game and a referee with independent noise."""
        truth = planted_estimate(4, 10, (4, 3, 2), strength=0.05)
        game, referee = (PlantedGame(truth.space, planted_loss(truth), noise, seed=seed) for seed in (1, 2))
        return truth, game, referee

    def test_a_random_plan_becomes_nearly_the_best(self) -> None:
        """Without an estimate, ``enough`` forwards lead from a random plan to a plan near the optimum, and the limit of
        forwards holds up to the last round."""
        truth, game, referee = self.games()
        start, plan = self.refine(None, game, referee, self.enough)
        best = least_loss(truth, start.budget_bytes)
        before, after = truth.predict(np.stack([start.pick, plan.pick])) - best
        assert after <= 0.1 * before, f"the plan is {after:.3f} above the optimum, the start {before:.3f}"
        evaluations = game.evaluations + referee.evaluations
        assert evaluations <= self.enough + SLACK, f"{evaluations} evaluations, more than the limit {self.enough}"

    def test_nothing_worse_is_taken(self) -> None:
        """With noise in both games, the plan's loss on the referee's windows is at most the start's. The plan has the
        estimate's prediction."""
        truth, game, referee = self.games(noise=0.2)
        start, plan = self.refine(truth, game, referee, 200)
        before, after = (referee.window_losses(p.pick).mean() for p in (start, plan))
        assert after <= before, f"the referee's loss is {after:.3f} for the new plan and {before:.3f} for the start"
        assert plan.nbytes <= start.budget_bytes
        assert plan.predicted_loss is not None and np.isclose(plan.predicted_loss, truth.predict(plan.pick)[0])

    def test_a_referee_that_sees_no_difference_lets_nothing_pass(self) -> None:
        """If all of the referee's losses are equal, the plan stays the start."""
        truth, game, _ = self.games()
        start, plan = self.refine(truth, game, PlantedGame(game.space, lambda pick: 3.0), 60)
        assert np.array_equal(plan.pick, start.pick), "a plan was accepted that is no better"

    def test_losses_that_are_not_finite_are_passed_over(self) -> None:
        """If losses are NaN or infinite with either of two layers at its narrowest, the search ends with a good plan
        among the other plans."""
        truth, game, referee = self.games()
        start, _ = self.refine(None, game, referee, 0)
        narrowest = len(truth.space.choices) - 1
        layers = np.flatnonzero(start.pick < narrowest)[:2]
        loss = planted_loss(truth)
        penalty = np.zeros_like(truth.linear)
        penalty[layers, -1] = 1000.0
        best = least_loss(replace(truth, linear=truth.linear + penalty), start.budget_bytes)
        for bad in (np.nan, np.inf):
            def overflowing(pick: IntArray, bad: float = bad) -> float:
                return bad if (pick[layers] == narrowest).any() else loss(pick)

            game, referee = (PlantedGame(truth.space, overflowing) for _ in range(2))
            start, plan = self.refine(None, game, referee, self.enough)
            assert (plan.pick[layers] < narrowest).all(), f"a plan with a loss of {bad} was accepted"
            before, after = truth.predict(np.stack([start.pick, plan.pick])) - best
            assert after <= 0.3 * before, f"the plan is {after:.3f} above the optimum, the start {before:.3f}"

    def test_limits_of_the_plan_are_kept(self) -> None:
        """A refiner that takes limits finds a plan within those of the start."""
        if not self.part.takes_limits:
            return
        truth, game, referee = self.games()
        space = truth.space
        budget = (space.low_bytes + space.high_bytes) // 2
        pick = random_plan(space, budget, np.random.default_rng(0))
        cost = Cost("cost", "ms", "planted", np.random.default_rng(2).random(space.nbytes.shape))
        start = Plan(space, pick, budget, method="random", costs=(replace(cost, limit=1.05 * cost.of(pick)),))
        plan = self.make().refine(start, truth, game, referee, 300, np.random.default_rng(1))
        assert start.admits(plan.pick), "the plan exceeds the budget or the limit of the start"
        assert truth.predict(plan.pick)[0] < truth.predict(pick)[0], "no better plan was found"

    def test_it_ends_where_there_is_nothing_left_to_measure(self) -> None:
        """The search ends if every plan is measured: repeated losses are free, so the limit is never reached."""
        truth = planted_estimate(5, 2, (4, 2), rising=True)
        game, referee = (_Memoised(truth.space, planted_loss(truth)) for _ in range(2))
        start, plan = self.refine(None, game, referee, 1000)
        assert plan.nbytes <= start.budget_bytes

    def test_the_same_seed_makes_the_same_plan(self) -> None:
        """Two refinements with one seed and noise give the same plan."""
        plans = [self.refine(*self.games(0.2), 100)[1] for _ in range(2)]
        assert np.array_equal(plans[0].pick, plans[1].pick), "two runs with one seed differ"


class _Memoised(PlantedGame):
    """Charges each distinct pick once, as the game of a model does, and fails after 100,000 requests."""

    requests = 0

    def _windows(self, pick: IntArray) -> FloatArray:
        self.requests += 1
        assert self.requests < 100_000, "the search does not end: it requests measured losses again and again"
        return super()._windows(pick)

    def losses(self, picks: IntArray) -> FloatArray:
        """Losses of picks above the reference; only new picks are charged."""
        losses = super().losses(picks)
        self._charge(picks)
        return losses

    def window_losses(self, pick: IntArray) -> FloatArray:
        """Absolute loss of a pick on each window; charged if the pick is new."""
        losses = super().window_losses(pick)
        self._charge(pick[None])
        return losses

    def _charge(self, picks: IntArray) -> None:
        self._measured = {*getattr(self, "_measured", ()), *(pick.tobytes() for pick in picks)}
        self.evaluations = len(self._measured)
