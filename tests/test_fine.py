"""The coarse-to-fine estimator on games with known answers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from impq_qp.program import QuadraticProgram
from impq_scores.fine import CoarseToFine, Moves, Options, cheapest, undecided

from impq_core.errors import ImpqError
from impq_core.space import FloatArray, IntArray
from impq_core.testing import PlantedGame, least_loss, planted_estimate

N, BITS = 9, (4, 3, 2)
TRUTH = planted_estimate(4, N, BITS)
SPACE = TRUTH.space
BUDGET = int(0.5 * (SPACE.low_bytes + SPACE.high_bytes))


class Slopes:
    """A probe with the true costs as gradients, at another scale and with a systematic error."""

    def __init__(self, error: float) -> None:
        wrong = np.random.default_rng(0).normal(1.0, error, TRUTH.linear.shape)
        self.space, self.window_tokens, self.forwards = SPACE, 10, 0.0
        self._costs = np.concatenate(
            [np.zeros((N, 1)), (2 * np.diff(TRUTH.linear, axis=1) * wrong[:, 1:]).cumsum(axis=1)], axis=1)

    def slopes(self, at: FloatArray | None = None) -> FloatArray:
        self.forwards += 3
        return np.tile(self._costs, (4, 1, 1))

    def weight(self, *args: object) -> None: ...

    def variant(self, *args: object) -> None: ...

    def block_states(self) -> Iterator[None]: ...


def _regret(error: float, options: Options, noise: float = 0.0) -> float:
    game = PlantedGame(SPACE, _loss, noise=noise, probe=Slopes(error), budget_bytes=BUDGET)
    estimate = CoarseToFine(options).estimate(game, np.random.default_rng(0))
    pick = QuadraticProgram().allocate(estimate, BUDGET).pick
    return float(TRUTH.predict(pick)[0]) - least_loss(TRUTH, BUDGET)


def _loss(pick: IntArray) -> float:
    return 3.0 + float(TRUTH.predict(pick)[0])


def test_measured_moves_mend_what_gradients_get_wrong() -> None:
    assert _regret(0.0, Options(share=0.1, rounds=1)) == pytest.approx(0.0, abs=1e-9)  # the scale does not matter
    coarse = np.mean([_regret(1.0, Options(share=1e-9, rounds=1))])
    assert _regret(1.0, Options(share=0.5, rounds=2)) < 0.5 * coarse
    assert _regret(1.0, Options(share=0.5, rounds=2), noise=0.05) < 0.5 * coarse


def test_noise_is_not_believed_over_good_gradients() -> None:
    assert _regret(0.05, Options(share=0.5, rounds=2), noise=5.0) < 0.1


@given(st.integers(0, 10_000), st.integers(-12, 12), st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_the_cheapest_pick_fits_and_is_the_best_at_its_price(seed: int, exponent: int, share: float,
                                                             free: float) -> None:
    """At any scale of the costs, with ties, equal layers and layers that cost nothing."""
    rng = np.random.default_rng(seed)
    costs = np.concatenate([np.zeros((N, 1)), rng.integers(-1, 4, (N, 2)).cumsum(axis=1)], axis=1).astype(float)
    costs[rng.random(N) < free] = 0.0
    budget = int(SPACE.low_bytes + share * (SPACE.high_bytes - SPACE.low_bytes))
    scale = 10.0**exponent
    pick, price = cheapest(SPACE, costs * scale, budget)
    assert SPACE.bytes_of(pick) <= budget
    own, price = np.arange(N), price / scale
    priced = costs + price * SPACE.nbytes
    assert (priced[own, pick] <= priced.min(axis=1) + 1e-9).all()
    if price > 0:  # at any lower price the pick would not fit
        below = (costs + 0.999 * price * SPACE.nbytes).argmin(axis=1)
        assert SPACE.bytes_of(below) > budget
    # Powers of two scale without rounding; others can part two equal prices, between which another pick is best.
    np.testing.assert_array_equal(*(cheapest(SPACE, costs * exact, budget)[0] for exact in (1.0, 2.0**exponent)))
    layers = undecided(SPACE, costs * scale, pick, price * scale, {0})
    assert sorted(layers) == list(range(1, N))


def test_a_budget_below_the_smallest_plan_is_refused() -> None:
    with pytest.raises(ImpqError, match="smallest"):
        cheapest(SPACE, TRUTH.linear, SPACE.low_bytes - 1)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_moves_are_believed_the_same_at_any_scale(scale: float, noise: float) -> None:
    rng = np.random.default_rng(0)
    costs = []
    differences = {layer: rng.normal(0.2 * layer, noise, 8) for layer in (1, 3, 7)}
    for unit in (1.0, scale):
        moves = Moves()
        for layer, windows in differences.items():
            moves.add(layer, 0, 1, unit * windows)
        moves.add(3, 1, 0, -unit * differences[1])
        costs.append(moves.combine(unit * TRUTH.linear) / unit)
    np.testing.assert_allclose(costs[0], costs[1], rtol=1e-12)


def test_moves_that_cost_nothing_are_believed() -> None:
    moves = Moves()
    moves.add(2, 0, 1, np.zeros(4))
    costs = moves.combine(np.zeros((N, 3)))
    assert not costs.any()
