"""Learned shares on losses with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from impq_scores.learned import Gamma, within_budget

from impq_core.errors import ImpqError
from impq_core.space import FloatArray
from impq_core.testing import PlantedGame, PlantedProbe, best_pick, planted_estimate, planted_space
from impq_core.types import SensitivityEstimate

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("budget", ["low_bytes", "middle", "high_bytes"])
def test_an_additive_game_gives_the_best_plan_at_any_budget(budget: str) -> None:
    truth = planted_estimate(2, 6, (4, 3, 2), rising=True)
    middle = (truth.space.low_bytes + truth.space.high_bytes) // 2
    nbytes = middle if budget == "middle" else getattr(truth.space, budget)
    game = PlantedGame(truth.space, lambda pick: 0.0, probe=PlantedProbe(truth), budget_bytes=nbytes)
    estimate = Gamma().estimate(game, RNG)
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


class BlendedProbe(PlantedProbe):
    """An additive loss whose slopes are those of independent errors, ``|sum_k p_k e_k|^2``: at the end, all choices in
    use cost the same, but what was summed on the way ranks them."""

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        shares = np.broadcast_to(np.asarray(at), self._costs.shape)
        toward = 2 * shares * self._costs
        slopes: FloatArray = (toward - (shares * toward).sum(axis=1, keepdims=True))[None]
        return slopes


def test_what_is_summed_on_the_way_ranks_layers_of_one_size() -> None:
    space = planted_space(8, bits=(4, 2))
    sensitivity = np.arange(1.0, 9.0)
    truth = SensitivityEstimate(space, np.stack([np.zeros(8), sensitivity], axis=1))
    game = PlantedGame(space, lambda pick: 0.0, probe=BlendedProbe(truth))
    estimate = Gamma().estimate(game, RNG)
    for first in (0, 1):  # every other layer is of one size
        assert (np.diff(estimate.linear[first::2, 1]) > 0).all()
