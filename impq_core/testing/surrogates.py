"""Tests of the contract of ``Surrogate``."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Surrogate
from impq_core.testing.part import PartSuite
from impq_core.testing.planted import best_pick, planted_estimate, planted_measurements
from impq_core.types import Measurements, SensitivityEstimate

MENUS = ((4, 2), (4, 3, 2))
"""Menus of the tests: with two widths, and with more."""


class SurrogateSuite(PartSuite):
    """Tests a ``Surrogate`` on the losses of planted games along random orders of demotion."""

    part: ClassVar[type[Surrogate]]

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The part's estimate from measurements."""
        fitted: SensitivityEstimate = self.make().fit(measurements)
        return fitted

    def test_the_estimate_names_its_space_method_and_cost(self) -> None:
        """The estimate has the space and the forwards of the measurements (a fit costs none), and a method."""
        for bits in MENUS:
            measured = planted_measurements(planted_estimate(1, 6, bits, rising=True), permutations=8)
            estimate = self.fit(measured)
            assert estimate.space is measured.space and estimate.method
            assert estimate.forwards == measured.forwards, (
                f"the estimate has {estimate.forwards} forwards, the measurements {measured.forwards}")

    def test_an_additive_game_is_recovered(self) -> None:
        """Without noise, the best plan for the fit is nearly as good as the optimum."""
        for bits in MENUS:
            truth = planted_estimate(2, 6, bits, rising=True)
            budget = (truth.space.low_bytes + truth.space.high_bytes) // 2
            estimate = self.fit(replace(planted_measurements(truth, permutations=8), budget_bytes=budget))
            losses = truth.predict(np.stack([best_pick(estimate, budget), best_pick(truth, budget)]))
            spread = float(truth.linear[:, -1].std())
            regret = losses[0] - losses[1]
            assert regret <= 0.1 * spread, f"{bits}: the plan is {regret:.3f} above the optimum"

    def test_the_same_measurements_make_the_same_fit(self) -> None:
        """Two fits to the same noisy measurements are equal bit for bit."""
        measured = planted_measurements(planted_estimate(3, 5, rising=True), permutations=6, noise=0.1)
        first, second = self.fit(measured), self.fit(measured)
        assert np.array_equal(first.linear, second.linear)
        pairs = [np.asarray(fit.pairwise, dtype=float) for fit in (first, second)]
        assert np.array_equal(pairs[0], pairs[1], equal_nan=True)

    def test_too_little_is_fitted_or_refused(self) -> None:
        """A fit to one order, or to none, is an estimate or an ImpqError with a message."""
        measured = planted_measurements(planted_estimate(4, 5, rising=True), permutations=1)
        for rows in (np.arange(len(measured)), np.arange(2), np.arange(1)):
            try:
                self.fit(measured.part(rows))
            except ImpqError as error:
                assert str(error), "the error has no message"

    def test_a_loss_that_is_not_finite_is_refused(self) -> None:
        """A loss that is not finite is an ImpqError of one line (``Measurements.require_finite`` raises it)."""
        measured = planted_measurements(planted_estimate(4, 5, rising=True), permutations=4)
        for bad in (np.nan, np.inf, -np.inf):
            losses = measured.losses.copy()
            losses[7] = bad
            try:
                self.fit(replace(measured, losses=losses))
            except ImpqError as error:
                assert "\n" not in str(error), f"the message is not one line: {error!r}"
            else:
                raise AssertionError(f"a loss of {bad} was fitted")

    def test_losses_of_several_sets_of_windows_are_fitted(self) -> None:
        """If costs differ between texts and every pair of orders has its own text, the estimate is near the mean."""
        truth = planted_estimate(2, 6, rising=True)
        parts = []
        for number in range(8):
            noise = np.random.default_rng(number).normal(size=truth.linear.shape) * 0.02
            text = replace(truth, linear=truth.linear + noise * (np.arange(noise.shape[1]) > 0))
            parts.append(planted_measurements(text, permutations=2, seed=number))
        count = len(parts[0])
        measured = replace(parts[0], picks=np.concatenate([part.picks for part in parts]),
                           losses=np.concatenate([part.losses for part in parts]),
                           path=np.concatenate([part.path + 2 * number for number, part in enumerate(parts)]),
                           step=np.tile(parts[0].step, 8), replicate=np.repeat(np.arange(8), count),
                           windows=np.repeat(np.arange(8), count))
        losses = [truth.predict(best_pick(e, truth.space.low_bytes + 2000)) for e in (self.fit(measured), truth)]
        spread = float(truth.linear[:, -1].std())
        regret = losses[0] - losses[1]
        assert regret <= 0.1 * spread, f"the plan is {regret:.3f} above the optimum"
