"""Estimators that play single moves, on games with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from impq_scores.played import Clado, CladoOptions, Isolated, IsolatedOptions

from impq_core.errors import UsageError
from impq_core.testing import PlantedGame, planted_estimate, planted_space

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
    with pytest.raises(UsageError, match="none of the widths of --bits"):
        Isolated(IsolatedOptions(8.0)).check_space(SPACE)


@pytest.mark.parametrize("bits", [(4, 2), (4, 3, 2)])
def test_clado_recovers_pair_interactions(bits: tuple[float, ...]) -> None:
    truth = planted_estimate(1, 5, bits, strength=0.3)
    game = PlantedGame(truth.space, lambda pick: 3 + float(truth.predict(pick)[0]))
    picks = np.random.default_rng(1).integers(0, len(bits), (20, 5))
    free = Clado(CladoOptions(psd=False)).estimate(game, np.random.default_rng(0))
    np.testing.assert_allclose(free.predict(picks), game.losses(picks), atol=1e-9)
    convex = Clado().estimate(game, np.random.default_rng(0))
    n, m = truth.space.nbytes.shape
    assert convex.pairwise is not None
    matrix = convex.pairwise[:, 1:, :, 1:].copy()
    matrix[np.arange(n), :, np.arange(n)] = 0
    full = matrix.reshape(n * (m - 1), -1)
    own = np.arange(n * (m - 1))
    full[own, own] = 2 * convex.linear[:, 1:].ravel()
    if m == 2:  # with more widths the terms between two widths of one layer are dropped: it takes only one
        assert np.linalg.eigvalsh(full).min() > -1e-9


def test_clado_within_blocks_measures_fewer_pairs() -> None:
    costs = np.arange(1.0, 6.0)
    game = PlantedGame(SPACE, lambda pick: float(costs @ (pick > 0)))
    estimate = Clado(CladoOptions(pairs="block")).estimate(game, np.random.default_rng(0))
    assert game.evaluations == 10  # every planted layer is a block of its own
    np.testing.assert_allclose(estimate.linear[:, 1], costs)
