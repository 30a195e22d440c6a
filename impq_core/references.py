"""Allocations that know nothing of the layers: what any plan has to beat at the same bytes."""

from __future__ import annotations

import numpy as np

from impq_core.space import IntArray, SearchSpace


def first_last_high(space: SearchSpace, budget: int) -> IntArray:
    """The first and last blocks at the widest choice, moving inwards while the budget lasts."""
    last = max(layer.block for layer in space.everyone)
    depth = np.array([min(layer.block, last - layer.block) for layer in space.layers])
    return _promote(space, budget, np.argsort(depth, kind="stable"))


def random_plan(space: SearchSpace, budget: int, rng: np.random.Generator) -> IntArray:
    """Layers promoted one step at a time in random order while the budget lasts."""
    steps = rng.permutation(np.repeat(np.arange(len(space)), len(space.choices) - 1))
    pick = space.uniform(len(space.choices) - 1)
    left = budget - space.bytes_of(pick)
    for layer in steps:
        price = space.nbytes[layer, pick[layer] - 1] - space.nbytes[layer, pick[layer]]
        if price <= left:
            pick[layer] -= 1
            left -= price
    return pick


def _promote(space: SearchSpace, budget: int, order: IntArray) -> IntArray:
    """Each layer of ``order`` in turn at the widest choice that still fits."""
    pick = space.uniform(len(space.choices) - 1)
    left = budget - space.bytes_of(pick)
    for layer in order:
        prices = space.nbytes[layer] - space.nbytes[layer, -1]
        pick[layer] = int(np.flatnonzero(prices <= left)[0])
        left -= int(prices[pick[layer]])
    return pick
