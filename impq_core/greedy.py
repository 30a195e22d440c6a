"""Greedy plans: layers promoted or demoted one at a time, by predicted loss a byte or in a given order."""

from __future__ import annotations

import numpy as np

from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.types import SensitivityEstimate


def promote(estimate: SensitivityEstimate, budget: int) -> IntArray:
    """From all-narrowest, the change that saves most score a byte, while one fits and saves any.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    space = estimate.space
    space.check_budget(budget)
    pick = space.uniform(len(space.choices) - 1)
    while True:
        added, grown = changes(estimate, pick)
        rate = np.where((grown > 0) & (grown <= budget - space.bytes_of(pick)) & (added < 0),
                        -added / np.maximum(grown, 1), -np.inf)
        best = int(rate.argmax())
        if rate.flat[best] == -np.inf:
            return pick
        pick[best // rate.shape[1]] = best % rate.shape[1]


def demote(estimate: SensitivityEstimate, budget: int) -> IntArray:
    """From all-widest, the change that adds least score a byte freed, until the plan fits.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    space = estimate.space
    space.check_budget(budget)
    pick = space.uniform(0)
    while space.bytes_of(pick) > budget:
        added, grown = changes(estimate, pick)
        rate = np.where(grown < 0, added / np.maximum(-grown, 1), np.inf)
        best = int(rate.argmin())
        pick[best // rate.shape[1]] = best % rate.shape[1]
    return pick


def changes(estimate: SensitivityEstimate, pick: IntArray) -> tuple[FloatArray, IntArray]:
    """Score added and bytes added (n, m) by moving one layer of a pick (n,) to each choice."""
    space, layers = estimate.space, np.arange(len(pick))
    scores = estimate.linear
    if estimate.pairwise is not None:
        scores = scores + estimate.pairwise[:, :, layers, pick].sum(axis=2)
    return scores - scores[layers, pick][:, None], space.nbytes - space.nbytes[layers, pick][:, None]


def promote_in_order(space: SearchSpace, budget: int, layers: IntArray) -> IntArray:
    """From all-narrowest, promote each layer of ``layers`` in turn by one width step, if the step fits.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    space.check_budget(budget)
    pick = space.uniform(len(space.choices) - 1)
    free = budget - space.bytes_of(pick)
    for layer in layers:
        price = int(space.nbytes[layer, pick[layer] - 1] - space.nbytes[layer, pick[layer]])
        if price <= free:
            pick[layer] -= 1
            free -= price
    return pick
