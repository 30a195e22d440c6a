from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from impq_qp.local import search
from impq_qp.program import Options, QuadraticProgram

from impq_core.errors import ImpqError
from impq_core.testing import planted_space
from impq_core.types import SensitivityEstimate


def _estimate(seed: int, n: int, bits: tuple[float, ...], strength: float, scale: float = 1.0) -> SensitivityEstimate:
    rng = np.random.default_rng(seed)
    space = planted_space(n, bits)
    m = len(bits)
    linear = np.concatenate([np.zeros((n, 1)), rng.normal(0.5, 0.5, (n, m - 1)).cumsum(axis=1)], axis=1)
    pairs = np.zeros((n, m, n, m))
    pairs[:, 1:, :, 1:] = rng.normal(size=(n, m - 1, n, m - 1)) * strength
    pairs = pairs + pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(n), :, np.arange(n)] = 0
    return SensitivityEstimate(space, linear * scale, pairs * scale if strength else None)


def _brute(estimate: SensitivityEstimate, budget: int) -> float:
    space = estimate.space
    picks = np.array(list(itertools.product(range(len(space.choices)), repeat=len(space))))
    fits = space.nbytes[np.arange(len(space)), picks].sum(axis=1) <= budget
    return float(estimate.predict(picks[fits]).min())


@given(st.integers(0, 10_000), st.integers(1, 6), st.sampled_from([(4, 2), (4, 3, 2), (8, 4, 3, 2)]),
       st.sampled_from([0.0, 0.1, 1.0]), st.floats(0, 1), st.sampled_from([1.0, 1e-4]))
@settings(max_examples=60, deadline=None)
def test_plans_are_optimal_and_proven_so(seed: int, n: int, bits: tuple[float, ...], strength: float, share: float,
                                         scale: float) -> None:
    estimate = _estimate(seed, n, bits, strength, scale)
    space = estimate.space
    budget = int(space.low_bytes + share * (space.high_bytes - space.low_bytes))
    plan = QuadraticProgram().allocate(estimate, budget)
    best = _brute(estimate, budget)
    assert plan.nbytes <= budget
    assert plan.predicted_loss == pytest.approx(best, abs=1e-6 * scale, rel=1e-5)
    assert plan.predicted_loss == pytest.approx(float(estimate.predict(plan.pick)[0]))
    assert plan.bound is not None and plan.bound <= best + 1e-6 * scale


def test_a_solver_without_time_is_no_worse_than_the_local_search() -> None:
    estimate = _estimate(1, 40, (4, 3, 2), 0.5)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    heuristic = search(estimate, budget, 20, np.random.default_rng(0))
    plan = QuadraticProgram(Options(time_limit=0.5)).allocate(estimate, budget)
    assert plan.predicted_loss is not None
    assert plan.predicted_loss <= float(estimate.predict(heuristic)[0]) + 1e-9
    assert plan.gap is None or plan.gap >= 0


def test_a_budget_below_everything() -> None:
    estimate = _estimate(0, 4, (4, 2), 0.1)
    with pytest.raises(ImpqError, match="below the smallest plan"):
        QuadraticProgram().allocate(estimate, estimate.space.low_bytes - 1)


def test_the_same_estimate_gives_the_same_plan() -> None:
    estimate = _estimate(3, 16, (4, 2), 0.2)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    first, second = (QuadraticProgram().allocate(estimate, budget).pick for _ in range(2))
    np.testing.assert_array_equal(first, second)
