"""Estimators that play single moves, on games with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from impq_scores.played import Isolated, IsolatedOptions

from impq_core.errors import UsageError
from impq_core.testing import PlantedGame, planted_space

SPACE = planted_space(5, bits=(4, 3, 2))


def _game(strength: float) -> PlantedGame:
    rng = np.random.default_rng(0)
    costs = rng.random((5, 3)).cumsum(axis=1)
    return PlantedGame(SPACE, lambda q: float(1 + (c := costs[np.arange(5), q].sum()) + strength * c**2))


@pytest.mark.parametrize("base", [0.0, 3.0, 2.0])
def test_additive_games_are_recovered_from_any_base(base: float) -> None:
    game = _game(0.0)
    estimate = Isolated(IsolatedOptions(base)).estimate(game, np.random.default_rng(0))
    picks = np.random.default_rng(1).integers(0, 3, (20, 5))
    np.testing.assert_allclose(estimate.predict(picks), game.losses(picks))


def test_a_base_measures_the_moves_made_there() -> None:
    game = _game(0.3)
    estimate = Isolated(IsolatedOptions(3.0)).estimate(game, np.random.default_rng(0))
    middle = SPACE.uniform(1)
    for layer in range(5):
        moved = middle.copy()
        moved[layer] = 2
        step = estimate.linear[layer, 2] - estimate.linear[layer, 1]
        assert step == pytest.approx(game.loss(moved) - game.loss(middle))
    with pytest.raises(UsageError, match="none of the widths played"):
        Isolated(IsolatedOptions(8.0)).check_space(SPACE)
