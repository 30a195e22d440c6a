"""What every refiner must do."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from impq_core.interfaces import Refiner
from impq_core.references import random_plan
from impq_core.space import FloatArray, IntArray
from impq_core.testing.part import PartSuite
from impq_core.testing.planted import PlantedGame, least_loss, planted_estimate, planted_loss
from impq_core.types import Plan, SensitivityEstimate

SLACK = 20
"""Evaluations by which a last round may pass what it was allowed."""


class RefinerSuite(PartSuite):
    """A ``Refiner`` on a planted game of ten layers with pair terms, from a random plan.

    Class attributes:
        enough: forwards with which it comes near the best plan.
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
        """The truth, and a game and a referee with noise of their own."""
        truth = planted_estimate(4, 10, (4, 3, 2), strength=0.05)
        game, referee = (PlantedGame(truth.space, planted_loss(truth), noise, seed=seed) for seed in (1, 2))
        return truth, game, referee

    def test_a_random_plan_becomes_nearly_the_best(self) -> None:
        """Without an estimate and with ``enough`` forwards; never over the budget in bytes or, but for its last round,
        in forwards."""
        truth, game, referee = self.games()
        start, plan = self.refine(None, game, referee, self.enough)
        best = least_loss(truth, start.budget_bytes)
        before, after = truth.predict(np.stack([start.pick, plan.pick])) - best
        assert after <= 0.1 * before, f"{after:.3f} above the best plan; it began at {before:.3f}"
        spent = game.evaluations + referee.evaluations
        assert spent <= self.enough + SLACK, f"{spent} evaluations instead of {self.enough}"

    def test_nothing_worse_is_taken(self) -> None:
        """By the referee's losses, with noise in both games; the plan carries the estimate's prediction."""
        truth, game, referee = self.games(noise=0.2)
        start, plan = self.refine(truth, game, referee, 200)
        before, after = (referee.window_losses(p.pick).mean() for p in (start, plan))
        assert after <= before, f"the referee has {after:.3f} for the new plan and {before:.3f} for the old one"
        assert plan.nbytes <= start.budget_bytes
        assert plan.predicted_loss is not None and np.isclose(plan.predicted_loss, truth.predict(plan.pick)[0])

    def test_a_referee_that_sees_no_difference_lets_nothing_pass(self) -> None:
        """The plan stays."""
        truth, game, _ = self.games()
        start, plan = self.refine(truth, game, PlantedGame(game.space, lambda pick: 3.0), 60)
        assert np.array_equal(plan.pick, start.pick), "a plan was taken that is no better"

    def test_losses_that_are_not_finite_are_passed_over(self) -> None:
        """NaN or infinite losses with either of two layers at its narrowest: the search goes on to a good plan among
        the others, and ends."""
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
            assert (plan.pick[layers] < narrowest).all(), f"a plan with a loss of {bad} was taken"
            before, after = truth.predict(np.stack([start.pick, plan.pick])) - best
            assert after <= 0.3 * before, f"{after:.3f} above the best plan; it began at {before:.3f}"

    def test_it_ends_where_there_is_nothing_left_to_measure(self) -> None:
        """A loss that was measured before costs nothing: in a small space the forwards are never spent."""
        truth = planted_estimate(5, 2, (4, 2), rising=True)
        game, referee = (_Remembering(truth.space, planted_loss(truth)) for _ in range(2))
        start, plan = self.refine(None, game, referee, 1000)
        assert plan.nbytes <= start.budget_bytes

    def test_the_same_seed_makes_the_same_plan(self) -> None:
        """With noise."""
        plans = [self.refine(*self.games(0.2), 100)[1] for _ in range(2)]
        assert np.array_equal(plans[0].pick, plans[1].pick), "two runs with one seed differ"


class _Remembering(PlantedGame):
    """Counts a pick once, as a model's game does, and fails after 100,000 questions."""

    asked = 0

    def _windows(self, pick: IntArray) -> FloatArray:
        self.asked += 1
        assert self.asked < 100_000, "it goes on for ever, asking for losses it has seen"
        return super()._windows(pick)

    def losses(self, picks: IntArray) -> FloatArray:
        """As often as they are new."""
        return self._counted(picks, super().losses(picks))

    def window_losses(self, pick: IntArray) -> FloatArray:
        """The same."""
        return self._counted(pick[None], super().window_losses(pick))

    def _counted(self, picks: IntArray, found: FloatArray) -> FloatArray:
        self._known = {*getattr(self, "_known", ()), *(pick.tobytes() for pick in picks)}
        self.evaluations = len(self._known)
        return found
