"""Allocators beyond the conformance suite: scores of any scale, zeros, ties, equal layers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from impq_greedy.allocators import Exhaustive, ExhaustiveOptions, Greedy
from impq_qp.local import search
from impq_qp.program import QuadraticProgram

from impq_core.errors import ImpqError
from impq_core.greedy import demote, promote
from impq_core.testing import least_loss, planted_estimate, planted_space
from impq_core.types import SensitivityEstimate


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Fails a test that does not end in time."""
    def stop(*_: object) -> None:
        raise AssertionError(f"it had not ended after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def coarse_estimates(draw: st.DrawFn) -> SensitivityEstimate:
    """Estimates of small integers, so that zeros, ties and equal layers are common."""
    n, bits = draw(st.integers(1, 6)), draw(st.sampled_from([(4, 2), (4, 3, 2)]))
    m = len(bits)
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    kinds = rng.integers(0, draw(st.integers(1, n)), n)  # layers of one kind are equal
    steps = rng.integers(draw(st.sampled_from([-2, 0])), 4, (n, m - 1))[kinds]
    steps[rng.random(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0  # layers that cost nothing
    linear = np.concatenate([np.zeros((n, 1)), steps.cumsum(axis=1)], axis=1)
    pairs = np.zeros((n, m, n, m))
    if draw(st.booleans()):
        couplings = rng.integers(-1, 2, (n, m, n, m))[kinds][:, :, kinds]
        pairs[:, 1:, :, 1:] = (couplings + couplings.transpose(2, 3, 0, 1))[:, 1:, :, 1:] / 2
        pairs[np.arange(n), :, np.arange(n)] = 0
    return SensitivityEstimate(planted_space(n, bits), linear, pairs)


def scaled(estimate: SensitivityEstimate, scale: float) -> SensitivityEstimate:
    """The same estimate in another unit."""
    assert estimate.pairwise is not None
    return SensitivityEstimate(estimate.space, estimate.linear * scale, estimate.pairwise * scale)


@given(coarse_estimates(), st.floats(0, 1), st.integers(-12, 12))
@settings(max_examples=60, deadline=None)
def test_plans_do_not_depend_on_the_scale_of_the_scores(estimate: SensitivityEstimate, share: float,
                                                        exponent: int) -> None:
    space, scale = estimate.space, 10.0**exponent
    budget = int(space.low_bytes + share * (space.high_bytes - space.low_bytes))
    best = least_loss(estimate, budget)
    other, rounding = scaled(estimate, scale), 1e-9 * (1 + abs(best))
    with ends_within(30):
        greedy, exhaustive, program = (
            part.allocate(other, budget) for part in (Greedy(), Exhaustive(), QuadraticProgram()))
    for plan in (greedy, exhaustive, program):
        assert plan.nbytes <= budget
    scores = estimate.score(np.stack([plan.pick for plan in (greedy, exhaustive, program)]))
    assert scores[1] == pytest.approx(best, abs=rounding)
    assert scores[2] == pytest.approx(best, abs=rounding)
    assert scores[0] >= best - rounding
    assert program.bound is not None and program.predicted_loss is not None
    assert program.bound <= scale * (best + rounding)
    assert program.bound >= scale * (best - 1e-5 * (1 + abs(best)))  # and it is proven
    for part in (Greedy(), QuadraticProgram()):  # a power of two scales without rounding
        picks = [part.allocate(scaled(estimate, 2.0**power), budget).pick for power in (0, 3 * exponent)]
        np.testing.assert_array_equal(*picks)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12])
def test_the_local_search_ends_with_equal_layers_at_any_scale(scale: float) -> None:
    """Four layers of each of three kinds; exchanges of equal layers change the score by rounding only."""
    space = planted_space(12, (4, 3, 2))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        linear = np.repeat(rng.normal(size=(3, 3)), 4, axis=0)
        pairs = rng.normal(size=(3, 3, 3, 3))
        pairs = np.repeat(np.repeat(pairs + pairs.transpose(2, 3, 0, 1), 4, axis=0), 4, axis=2) / 2
        pairs[:, 0] = pairs[:, :, :, 0] = 0
        pairs[np.arange(12), :, np.arange(12)] = 0
        linear[:, 0] = 0
        estimate = SensitivityEstimate(space, linear * scale, pairs * scale, is_loss=False)
        budget = (space.low_bytes + space.high_bytes) // 2
        with ends_within(20):
            pick = search(estimate, budget, 20, np.random.default_rng(0))
        greedy = np.stack([promote(estimate, budget), demote(estimate, budget)])
        assert space.bytes_of(pick) <= budget and estimate.score(pick)[0] <= estimate.score(greedy).min()


def test_a_layer_that_costs_nothing_is_demoted_and_the_plan_is_proven() -> None:
    costs = np.array([[0.0, 0.0], [0.0, 0.01], [0.0, 0.0]])
    space = planted_space(3)
    with ends_within(20):
        plan = QuadraticProgram().allocate(SensitivityEstimate(space, costs), space.high_bytes - 1)
    assert plan.pick[1] == 0 and plan.predicted_loss == 0 and plan.gap is not None and plan.gap <= 1e-9


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_greedy_is_the_better_of_its_directions(seed: int, share: float) -> None:
    estimate = planted_estimate(seed, 8, (4, 3, 2), 0.2)
    budget = int(estimate.space.low_bytes + share * (estimate.space.high_bytes - estimate.space.low_bytes))
    plan = Greedy().allocate(estimate, budget)
    both = estimate.predict(np.stack([promote(estimate, budget), demote(estimate, budget)]))
    assert plan.predicted_loss == both.min()
    assert estimate.predict(search(estimate, budget, 1, np.random.default_rng(0)))[0] <= both.min()


def test_exhaustive_refuses_more_plans_than_it_was_allowed() -> None:
    with pytest.raises(ImpqError, match="more than most=1000; use qp"):
        Exhaustive(ExhaustiveOptions(1000)).allocate(planted_estimate(0, 10, (4, 2), 0.0), 10**9)
