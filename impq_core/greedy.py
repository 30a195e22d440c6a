"""Greedy plans: layers promoted or demoted one at a time, by predicted loss a byte or in a given order.

With limits on further costs, the bytes of a change are replaced by its *weight*: the sum of what it adds in bytes and
in each limited cost, each over the spread between the smallest and the largest plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from impq_core.costs import Cost, fits
from impq_core.feasible import any_fitting
from impq_core.space import BoolArray, FloatArray, IntArray, SearchSpace
from impq_core.types import SensitivityEstimate


def promote(estimate: SensitivityEstimate, budget: int, limits: Sequence[Cost] = ()) -> IntArray:
    """From all-narrowest, or another pick within the limits if that is not, the change that saves most score a byte,
    while one fits and saves any.

    Raises:
        ImpqError: the budget is below the smallest plan, or no plan is within budget and limits.
    """
    space = estimate.space
    pick = any_fitting(space, budget, limits)
    while True:
        added, grown = changes(estimate, pick)
        weight = grown if not limits else _weight(space, pick, limits)
        fitting = (grown <= budget - space.bytes_of(pick)) & within(limits, pick) & (added < 0)
        if limits:  # a change that saves score and weight comes before all others
            rate = np.where(fitting, -added / np.maximum(weight, 1e-9), -np.inf)
        else:
            rate = np.where(fitting & (grown > 0), -added / np.maximum(grown, 1), -np.inf)
        best = int(rate.argmax())
        if rate.flat[best] == -np.inf:
            return pick
        before = pick.copy()
        pick[best // rate.shape[1]] = best % rate.shape[1]
        if limits and not np.diff(estimate.score(np.stack([before, pick])))[0] < 0:  # no saving beyond rounding
            return before


def demote(estimate: SensitivityEstimate, budget: int, limits: Sequence[Cost] = ()) -> IntArray:
    """From all-widest, the change that adds least score a byte freed, until the plan fits. With limits, only what
    exceeds its limit is to be freed; if no change frees any of it, the plan is that of ``promote``.

    Raises:
        ImpqError: the budget is below the smallest plan, or no plan is within budget and limits.
    """
    space = estimate.space
    space.check_budget(budget)
    pick = space.uniform(0)
    while not fits(space, pick, budget, limits):
        added, grown = changes(estimate, pick)
        freed = -grown if not limits else _freed(space, pick, budget, limits)
        rate = np.where(freed > 0, added / np.maximum(freed, 1 if not limits else 1e-12), np.inf)
        best = int(rate.argmin())
        if rate.flat[best] == np.inf:
            return promote(estimate, budget, limits)
        pick[best // rate.shape[1]] = best % rate.shape[1]
    return pick


def within(limits: Sequence[Cost], pick: IntArray) -> BoolArray:
    """Whether a pick (n,) keeps all limits after one layer moves to a choice, bool (n, m); true without limits."""
    kept: BoolArray = np.array(True)
    for cost in limits:
        kept = kept & (cost.grown(pick) <= cost.room(pick))
    return kept


def _spreads(space: SearchSpace, limits: Sequence[Cost]) -> list[float]:
    """Spread of the bytes and of each limited cost over all picks."""
    tables = [space.nbytes, *(cost.values for cost in limits)]
    return [float(np.ptp(table, axis=1).sum()) or 1.0 for table in tables]


def _weight(space: SearchSpace, pick: IntArray, limits: Sequence[Cost]) -> FloatArray:
    """The weight (n, m) that moving one layer of a pick (n,) to each choice adds."""
    grown = [space.nbytes - space.nbytes[np.arange(len(pick)), pick][:, None], *(cost.grown(pick) for cost in limits)]
    total: FloatArray = sum(added / spread for added, spread in zip(grown, _spreads(space, limits), strict=True))
    return total


def _freed(space: SearchSpace, pick: IntArray, budget: int, limits: Sequence[Cost]) -> FloatArray:
    """How much less a pick (n,) exceeds budget and limits, each over its spread, after one layer moves to a choice."""
    grown = [space.nbytes - space.nbytes[np.arange(len(pick)), pick][:, None], *(cost.grown(pick) for cost in limits)]
    rooms = [float(budget - space.bytes_of(pick)), *(cost.room(pick) for cost in limits)]
    total: FloatArray = sum((max(0.0, -room) - np.maximum(added - room, 0.0)) / spread for added, room, spread
                            in zip(grown, rooms, _spreads(space, limits), strict=True))
    return total


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
