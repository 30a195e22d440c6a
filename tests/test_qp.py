from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from impq_qp.blocks import parts_of, solve_parts
from impq_qp.linearized import branch
from impq_qp.local import search
from impq_qp.program import Options, QuadraticProgram, solve
from impq_qp.relaxation import Program, relaxations

from impq_core.testing import least_loss, planted_estimate
from impq_core.types import SensitivityEstimate


@pytest.mark.parametrize("limit", [{"work_limit": 0.2}, {"time_limit": 0.5}])
def test_a_proof_cut_short_is_no_worse_than_the_local_search(limit: dict[str, float]) -> None:
    estimate = planted_estimate(1, 40, (4, 3, 2), 0.5)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    heuristic = search(estimate, budget, 20, np.random.default_rng(0))
    plan = QuadraticProgram(Options(**limit)).allocate(estimate, budget)
    assert plan.predicted_loss is not None and plan.gap is not None
    assert plan.predicted_loss <= float(estimate.predict(heuristic)[0]) + 1e-9
    assert plan.gap > 1e-3  # it was cut short


def test_a_plan_that_is_not_proven_does_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = planted_estimate(1, 40, (4, 3, 2), 0.5)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    plans = []
    for pace in (0.0, 1e6):  # seconds that go by between two looks at the clock
        ticks = itertools.count()
        monkeypatch.setattr("time.monotonic", lambda ticks=ticks, pace=pace: pace * next(ticks))
        plans.append(QuadraticProgram(Options(work_limit=0.5)).allocate(estimate, budget))
    first, second = plans
    np.testing.assert_array_equal(first.pick, second.pick)
    assert first.gap is not None and first.gap > 1e-3
    assert first.bound == second.bound


def test_a_part_that_the_solver_leaves_open_keeps_a_bound() -> None:
    estimate = planted_estimate(2, 12, (4, 3, 2), 2.0)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    program = Program.of(estimate, budget, np.ones(estimate.space.nbytes.shape, dtype=bool))
    best = least_loss(estimate, budget)
    _, cut_short = branch(program, (), "compact", best + 10, nodes=1)
    _, whole = branch(program, (), "compact", best + 10)
    assert cut_short < whole == pytest.approx(best, abs=1e-5)


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


@pytest.mark.parametrize("linearization", ["auto", "paper", "compact"])
@pytest.mark.parametrize("seed", range(6))
def test_all_linearizations_are_the_same_program(linearization: str, seed: int) -> None:
    estimate = planted_estimate(seed, 6, (8, 4, 2), 0.5)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    solved, bound = solve(estimate, budget, Options(linearization=linearization))
    best = least_loss(estimate, budget)
    assert float(estimate.predict(solved)[0]) == pytest.approx(best)
    assert bound == pytest.approx(best, abs=1e-5)


def gram_estimate(seed: int, layers: int, bits: tuple[float, ...], strength: float, rank: int) -> SensitivityEstimate:
    """A planted estimate whose pair terms are, but for those within a layer, positive semidefinite."""
    estimate = planted_estimate(seed, layers, bits)
    n, m = estimate.linear.shape
    factors = np.random.default_rng(seed).normal(size=(n, m, rank)) * np.sqrt(strength / rank)
    factors[:, 0] = 0
    pairs = np.einsum("ikr,jlr->ikjl", factors, factors)
    pairs[np.arange(n), :, np.arange(n)] = 0
    return replace(estimate, pairwise=pairs)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), bits=st.sampled_from([(4, 2), (4, 3, 2), (8, 4, 3, 2)]),
       strength=st.sampled_from([0.01, 0.3, 2.0]), share=st.floats(0, 1), gram=st.booleans(),
       scale=st.sampled_from([1.0, 1e-6]))
@settings(max_examples=60, deadline=None)
def test_bounds_hold_and_proofs_are_of_the_optimum(seed: int, n: int, bits: tuple[float, ...], strength: float,
                                                   share: float, gram: bool, scale: float) -> None:
    estimate = gram_estimate(seed, n, bits, strength, 2) if gram else planted_estimate(seed, n, bits, strength)
    assert estimate.pairwise is not None
    estimate = replace(estimate, linear=estimate.linear * scale, pairwise=estimate.pairwise * scale)
    space = estimate.space
    budget = int(space.low_bytes + share * (space.high_bytes - space.low_bytes))
    best = least_loss(estimate, budget)
    program = Program.of(estimate, budget, np.ones(space.nbytes.shape, dtype=bool))
    for _, cut in relaxations(program, 5, 1e-3):
        assert cut.bound(program)[0] <= best
    plan = QuadraticProgram().allocate(estimate, budget)
    assert plan.bound is not None and plan.predicted_loss is not None and plan.gap is not None
    assert plan.bound <= best + 1e-12 * scale <= plan.predicted_loss + 1e-9 * scale
    assert plan.gap <= 2e-6 * abs(best) + 1e-6 * scale
    assert plan.predicted_loss == pytest.approx(best, abs=1e-6 * scale)


def test_relaxations_close_only_what_no_better_plan_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impq_qp.program._PRODUCTS", 0)  # splits alone, HiGHS settles nothing
    for seed in range(8):
        estimate = planted_estimate(seed, 6, (8, 4, 2), 1.0)
        budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
        plan = QuadraticProgram(Options(starts=1)).allocate(estimate, budget)
        assert plan.predicted_loss == pytest.approx(least_loss(estimate, budget))
        assert plan.gap is not None and plan.gap <= 2e-6 * abs(plan.predicted_loss)


def test_a_dense_program_of_64_layers_is_proven_and_the_same_twice() -> None:
    estimate = gram_estimate(0, 64, (4, 3, 2), 0.02, 64)
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    first, second = (QuadraticProgram().allocate(estimate, budget) for _ in range(2))
    np.testing.assert_array_equal(first.pick, second.pick)
    assert first.bound == second.bound and first.predicted_loss is not None
    assert first.gap is not None and first.gap < 0.01 * abs(first.predicted_loss)


def _in_blocks(seed: int, sizes: tuple[int, ...], bits: tuple[float, ...]) -> SensitivityEstimate:
    """A planted estimate with pair terms within consecutive blocks of layers only."""
    estimate = planted_estimate(seed, sum(sizes), bits, 1.0)
    block = np.repeat(np.arange(len(sizes)), sizes)
    assert estimate.pairwise is not None
    return replace(estimate, pairwise=estimate.pairwise * (block[:, None] == block)[:, None, :, None])


@pytest.mark.parametrize("seed", range(20))
def test_plans_of_separate_blocks_are_the_best(seed: int) -> None:
    estimate = _in_blocks(seed, (3, 1, 4), (4, 3, 2)[:2 + seed % 2])
    low, high = estimate.space.low_bytes, estimate.space.high_bytes
    for budget in (low, low + (high - low) // 3, (low + high) // 2, high):
        parts = parts_of(estimate)
        assert parts is not None and sorted(len(part.layers) for part in parts) == [1, 3, 4]
        pick = solve_parts(estimate, budget, parts)
        assert pick is not None and estimate.space.bytes_of(pick) <= budget
        assert float(estimate.predict(pick)[0]) == pytest.approx(least_loss(estimate, budget), abs=1e-9)


def test_separate_blocks_are_proven_where_the_whole_program_is_not() -> None:
    estimate = _in_blocks(1, (7,) * 20, (4, 3, 2))
    budget = (estimate.space.low_bytes + estimate.space.high_bytes) // 2
    plan = QuadraticProgram().allocate(estimate, budget)
    assert plan.gap == 0 and plan.nbytes <= budget
    heuristic = search(estimate, budget, 2, np.random.default_rng(0))
    assert plan.predicted_loss is not None and plan.predicted_loss <= float(estimate.predict(heuristic)[0]) + 1e-9


def test_parts_that_are_too_large_are_not_enumerated() -> None:
    assert parts_of(planted_estimate(1, 40, (4, 3, 2), 0.5)) is None
    assert parts_of(planted_estimate(1, 4, (4, 3, 2))) is None  # no pairs
