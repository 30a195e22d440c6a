"""Reference allocations, which use no measurement: a plan has to be better at the same bytes."""

from __future__ import annotations

import numpy as np

from impq_core.greedy import promote_in_order
from impq_core.space import IntArray, SearchSpace


def first_last_high(space: SearchSpace, budget: int) -> IntArray:
    """Promote blocks to the widest choice from both ends inwards, as far as the budget allows. Embedding and head, if
    they are layers, are in front of the first and behind the last.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    order = np.argsort(depths(space), kind="stable")
    return promote_in_order(space, budget, np.repeat(order, len(space.choices) - 1))


def depths(space: SearchSpace) -> IntArray:
    """How far each layer (n,) is from the nearer end of the model, in blocks."""
    blocks = [layer.block for layer in space.everyone]
    first, last = min(0, *blocks), max(blocks)
    return np.array([min(layer.block - first, last - layer.block) for layer in space.layers], dtype=np.int64)


def random_plan(space: SearchSpace, budget: int, rng: np.random.Generator) -> IntArray:
    """Promote layers one step at a time in random order, as far as the budget allows.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    return promote_in_order(space, budget, rng.permutation(np.repeat(np.arange(len(space)), len(space.choices) - 1)))
