"""The coarse-to-fine estimator on games with known answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from impq_qp.program import QuadraticProgram
from impq_scores.fine import CoarseToFine, Options, cheapest

from impq_core.errors import ImpqError
from impq_core.space import FloatArray, IntArray
from impq_core.testing import PlantedGame, least_loss, planted_estimate

N, BITS = 9, (4, 3, 2)
TRUTH = planted_estimate(4, N, BITS)
SPACE = TRUTH.space
BUDGET = int(0.5 * (SPACE.low_bytes + SPACE.high_bytes))


class Slopes:
    """A probe whose gradients are the truth's costs, to another scale and with an error that does not average out."""

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


def test_the_cheapest_pick_fits_and_is_the_best_at_its_price() -> None:
    for budget in np.linspace(SPACE.low_bytes, SPACE.high_bytes, 7).astype(int):
        pick, price = cheapest(SPACE, TRUTH.linear, budget)
        assert SPACE.bytes_of(pick) <= budget
        for layer, choice in product(range(N), range(3)):
            other = pick.copy()
            other[layer] = choice
            gain = TRUTH.predict(pick)[0] - TRUTH.predict(other)[0]
            assert gain <= price * (SPACE.bytes_of(other) - SPACE.bytes_of(pick)) + 1e-9
    with pytest.raises(ImpqError, match="smallest"):
        cheapest(SPACE, TRUTH.linear, SPACE.low_bytes - 1)
