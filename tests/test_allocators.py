"""What every allocator must do, and what each does besides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from impq_greedy.allocators import Exhaustive, ExhaustiveOptions, demote, promote

from impq_core.errors import ImpqError
from impq_core.interfaces import Allocator
from impq_core.plugins import Plugins
from impq_core.space import Pinned
from impq_core.testing import least_loss, planted_estimate, planted_space

ALLOCATORS = {name: Plugins().load("allocator", name, Allocator)() for name in Plugins().names("allocator")}


@pytest.mark.parametrize("name", ALLOCATORS)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 5), bits=st.sampled_from([(4, 2), (4, 3, 2)]),
       strength=st.sampled_from([0.0, 0.3]), share=st.floats(0, 1), pinned=st.booleans())
@settings(max_examples=25, deadline=None)
def test_plans_fit_and_keep_their_promises(name: str, seed: int, n: int, bits: tuple[float, ...], strength: float,
                                           share: float, pinned: bool) -> None:
    estimate = planted_estimate(seed, n, bits, strength)
    if pinned:
        extra = planted_space(n + 1).layers[-1]
        estimate = replace(estimate, space=replace(estimate.space, pinned=(Pinned(extra, None, 999, 999, 999),)))
    space = estimate.space
    budget = int(space.low_bytes + share * (space.high_bytes - space.low_bytes))
    plan = ALLOCATORS[name].allocate(estimate, budget)
    assert plan.nbytes <= budget and plan.space is space
    assert plan.predicted_loss == pytest.approx(float(estimate.predict(plan.pick)[0]))
    best = least_loss(estimate, budget)
    assert plan.predicted_loss is not None and plan.predicted_loss >= best - 1e-6
    if plan.bound is not None:
        assert plan.bound <= best + 1e-6
    if name in ("qp", "exhaustive"):
        assert plan.predicted_loss == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_budget_below_everything_is_refused(name: str) -> None:
    estimate = planted_estimate(0, 4, (4, 2), 0.1)
    with pytest.raises(ImpqError, match="below the smallest plan"):
        ALLOCATORS[name].allocate(estimate, estimate.space.low_bytes - 1)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_greedy_is_the_better_of_its_directions(seed: int, share: float) -> None:
    estimate = planted_estimate(seed, 8, (4, 3, 2), 0.2)
    budget = int(estimate.space.low_bytes + share * (estimate.space.high_bytes - estimate.space.low_bytes))
    plan = ALLOCATORS["greedy"].allocate(estimate, budget)
    both = estimate.predict(np.stack([promote(estimate, budget), demote(estimate, budget)]))
    assert plan.predicted_loss == both.min()


def test_exhaustive_refuses_what_would_take_for_ever() -> None:
    with pytest.raises(ImpqError, match="more than most=1000; use qp"):
        Exhaustive(ExhaustiveOptions(1000)).allocate(planted_estimate(0, 10, (4, 2), 0.0), 10**9)
