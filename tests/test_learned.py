"""Learned shares on losses with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from impq_scores.learned import Gamma, Options, within_budget

from impq_core.errors import ImpqError
from impq_core.space import FloatArray, SearchSpace
from impq_core.testing import PlantedGame, PlantedProbe, best_pick, planted_estimate, planted_space

RNG = np.random.default_rng(0)


class QuadraticProbe(PlantedProbe):
    """``L = 1/2 sum_i h_i |sum_k p_ik e_ik|^2``: errors e of a layer's choices in directions of their own, so that the
    loss of a blend is below the blend of the losses. A window is a token, at which the gradient's square is the
    curvature."""

    def __init__(self, space: SearchSpace, weights: FloatArray) -> None:
        super().__init__(planted_estimate(0, len(space), [choice.bits for choice in space.choices]))
        self.losses = 0.5 * weights[:, None] * np.array([4.0**-choice.bits for choice in space.choices])  # (n, m)

    def _shares(self, at: FloatArray | None) -> FloatArray:
        assert at is not None
        return np.broadcast_to(at, self.losses.shape)

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        shares = self._shares(at)
        toward = 2 * shares * self.losses  # h e_p . e_k
        return (toward - (shares * toward).sum(axis=1, keepdims=True))[None]

    def token_squares(self, at: FloatArray | None = None) -> FloatArray:
        shares = self._shares(at)
        own = (shares**2 * self.losses).sum(axis=1, keepdims=True)
        return 2 * (self.losses * (1 - 2 * shares) + own)[None]  # h |e_k - e_p|^2


def test_a_quadratic_loss_is_found_exactly_with_its_curvature_and_not_without() -> None:
    space = planted_space(6, bits=(4, 3, 2))
    probe = QuadraticProbe(space, RNG.uniform(0.1, 10.0, 6))
    middle = (space.low_bytes + space.high_bytes) // 2
    game = PlantedGame(space, lambda pick: 0.0, probe=probe, budget_bytes=middle)
    estimate = Gamma(Options(steps=5, curvature=1.0)).estimate(game, RNG)
    np.testing.assert_allclose(estimate.linear, probe.losses - probe.losses[:, :1], rtol=1e-9)
    flat = Gamma(Options(steps=5, curvature=0.0)).estimate(game, RNG)
    assert not np.allclose(flat.linear, estimate.linear, rtol=0.1)


@pytest.mark.parametrize("budget", ["low_bytes", "middle", "high_bytes"])
def test_an_additive_game_gives_the_best_plan_at_any_budget(budget: str) -> None:
    truth = planted_estimate(2, 6, (4, 3, 2), rising=True)
    middle = (truth.space.low_bytes + truth.space.high_bytes) // 2
    nbytes = middle if budget == "middle" else getattr(truth.space, budget)
    game = PlantedGame(truth.space, lambda pick: 0.0, probe=PlantedProbe(truth), budget_bytes=nbytes)
    estimate = Gamma(Options(curvature=0.0)).estimate(game, RNG)
    np.testing.assert_array_equal(best_pick(estimate, nbytes), best_pick(truth, nbytes))


def test_shares_are_moved_as_little_as_the_budget_asks() -> None:
    shares, nbytes = RNG.dirichlet([1, 1, 1], 5), np.array([[40.0, 30.0, 20.0]] * 5)
    np.testing.assert_allclose(within_budget(shares, nbytes, 200.0), shares)
    moved = within_budget(shares, nbytes, 120.0)
    assert (moved * nbytes).sum() == pytest.approx(120.0, abs=1e-6)
    np.testing.assert_allclose(moved.sum(axis=1), 1.0)
    price = np.diff(np.log(moved / shares), axis=1)  # the same for every layer and step of 10 bytes
    np.testing.assert_allclose(price, price[0, 0])
    np.testing.assert_allclose(within_budget(shares, nbytes, 100.0)[:, 2], 1.0, atol=1e-6)


def test_a_slope_that_is_not_finite_makes_no_estimate() -> None:
    class Overflowing(PlantedProbe):
        def slopes(self, at: FloatArray | None = None) -> FloatArray:
            return super().slopes(at) * np.nan

    truth = planted_estimate(1, 4)
    with pytest.raises(ImpqError, match="not finite"):
        Gamma().estimate(PlantedGame(truth.space, lambda pick: 0.0, probe=Overflowing(truth)), RNG)
