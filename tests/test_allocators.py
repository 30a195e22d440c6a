"""What greedy and exhaustive do besides what every allocator must (test_conformance.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from impq_greedy.allocators import Exhaustive, ExhaustiveOptions, Greedy, demote, promote

from impq_core.errors import ImpqError
from impq_core.testing import planted_estimate


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_greedy_is_the_better_of_its_directions(seed: int, share: float) -> None:
    estimate = planted_estimate(seed, 8, (4, 3, 2), 0.2)
    budget = int(estimate.space.low_bytes + share * (estimate.space.high_bytes - estimate.space.low_bytes))
    plan = Greedy().allocate(estimate, budget)
    both = estimate.predict(np.stack([promote(estimate, budget), demote(estimate, budget)]))
    assert plan.predicted_loss == both.min()


def test_exhaustive_refuses_what_would_take_for_ever() -> None:
    with pytest.raises(ImpqError, match="more than most=1000; use qp"):
        Exhaustive(ExhaustiveOptions(1000)).allocate(planted_estimate(0, 10, (4, 2), 0.0), 10**9)
