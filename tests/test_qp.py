from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from impq_qp.local import search
from impq_qp.program import Options, QuadraticProgram, solve

from impq_core.testing import least_loss, planted_estimate


def test_a_solver_without_time_is_no_worse_than_the_local_search() -> None:
    estimate = planted_estimate(1, 40, (4, 3, 2), 0.5)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    heuristic = search(estimate, budget, 20, np.random.default_rng(0))
    plan = QuadraticProgram(Options(time_limit=0.5)).allocate(estimate, budget)
    assert plan.predicted_loss is not None
    assert plan.predicted_loss <= float(estimate.predict(heuristic)[0]) + 1e-9
    assert plan.gap is None or plan.gap >= 0


def test_the_same_estimate_gives_the_same_plan() -> None:
    estimate = planted_estimate(3, 16, (4, 2), 0.2)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    first, second = (QuadraticProgram().allocate(estimate, budget).pick for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_small_losses_are_as_exact_as_large_ones(scale: float) -> None:
    estimate = planted_estimate(5, 7, (8, 4, 2), 1.0)
    assert estimate.pairwise is not None
    estimate = replace(estimate, linear=estimate.linear * scale, pairwise=estimate.pairwise * scale)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    plan = QuadraticProgram().allocate(estimate, budget)
    assert plan.predicted_loss == pytest.approx(least_loss(estimate, budget), rel=1e-6)
    assert plan.gap is not None and plan.gap <= 1e-5 * scale


@pytest.mark.parametrize("linearization", ["paper", "compact"])
@pytest.mark.parametrize("seed", range(6))
def test_both_linearizations_are_the_same_program(linearization: str, seed: int) -> None:
    estimate = planted_estimate(seed, 6, (8, 4, 2), 0.5)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    solved, bound = solve(estimate, budget, estimate.space.uniform(2), Options(linearization=linearization))
    best = least_loss(estimate, budget)
    assert solved is not None and float(estimate.predict(solved)[0]) == pytest.approx(best)
    assert bound == pytest.approx(best, abs=1e-5)
