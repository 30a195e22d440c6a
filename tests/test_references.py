from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from impq_core.references import first_last_high, random_plan
from impq_core.testing import planted_space


@given(st.integers(1, 12), st.sampled_from([(4, 2), (8, 4, 2)]), st.floats(0, 1), st.integers(0, 99))
def test_references_fill_the_budget_and_no_more(n: int, bits: tuple[float, ...], share: float, seed: int) -> None:
    space = planted_space(n, bits)
    budget = int(space.low_bytes + share * (space.high_bytes - space.low_bytes))
    for pick in (first_last_high(space, budget), random_plan(space, budget, np.random.default_rng(seed))):
        assert space.bytes_of(pick) <= budget
        steps = space.nbytes[np.arange(n), np.maximum(pick - 1, 0)] - space.nbytes[np.arange(n), pick]
        assert all(space.bytes_of(pick) + step > budget for step, k in zip(steps, pick, strict=True) if k)


def test_first_and_last_keep_the_high_width() -> None:
    space = planted_space(8)
    budget = space.low_bytes + int((space.nbytes[:, 0] - space.nbytes[:, 1])[[0, 1, 6, 7]].sum())
    assert first_last_high(space, budget).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
