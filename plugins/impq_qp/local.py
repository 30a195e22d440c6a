"""Multi-start flip-and-swap local search for multiple-choice quadratic knapsacks.

Nothing here depends on the scale of the scores: a change is made if it lowers the computed score of the whole pick, so
no pick comes twice and the search ends.
"""

from __future__ import annotations

import numpy as np

from impq_core.greedy import changes, demote, promote
from impq_core.space import IntArray
from impq_core.types import SensitivityEstimate


def search(estimate: SensitivityEstimate, budget: int, starts: int, rng: np.random.Generator) -> IntArray:
    """The best pick (n,) found within ``budget`` bytes.

    Each start is improved until no change of one layer and no change of two layers together lowers the score within the
    budget. The first start is both greedy plans, so the result is never worse than those; the others are random.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    best = descend(estimate, promote(estimate, budget), budget)
    value = float(estimate.score(best)[0])
    for number in range(starts):
        start = _random_start(estimate, budget, rng) if number else demote(estimate, budget)
        pick = descend(estimate, start, budget)
        score = float(estimate.score(pick)[0])
        if score < value:
            best, value = pick, score
    return best


def descend(estimate: SensitivityEstimate, pick: IntArray, budget: int) -> IntArray:
    """Improve a pick by its best single or double change until none lowers its score."""
    space = estimate.space
    n, m = space.nbytes.shape
    layers = np.arange(n)
    same_layer = np.repeat(layers, m)[:, None] == np.repeat(layers, m)[None, :]
    score = float(estimate.score(pick)[0])
    while True:
        added, grown = changes(estimate, pick)
        single, size = added.ravel(), grown.ravel()
        room = budget - space.bytes_of(pick)
        double = single[:, None] + single[None, :]
        if estimate.pairwise is not None:
            pairs = estimate.pairwise
            at = pairs[:, :, layers, pick]  # (n, m, n): the other layer at its choice in the pick
            both = pairs[layers, pick][:, layers, pick]  # (n, n)
            double = double + (pairs - at[:, :, :, None] - at.transpose(2, 0, 1)[:, None]
                               + both[:, None, :, None]).reshape(n * m, n * m)
        double = np.where(same_layer | (size[:, None] + size[None, :] > room), np.inf, double)
        single = np.where(size > room, np.inf, single)
        best_single, best_double = int(single.argmin()), int(double.argmin())
        moves = ([best_single] if single[best_single] <= double.flat[best_double]
                 else list(divmod(best_double, n * m)))
        moved = pick.copy()
        for move in moves:
            moved[move // m] = move % m
        lower = float(estimate.score(moved)[0])
        if not lower < score:  # no gain, or one that is rounding
            return pick
        pick, score = moved, lower


def _random_start(estimate: SensitivityEstimate, budget: int, rng: np.random.Generator) -> IntArray:
    """From all-narrowest, each layer in random order at a random choice that fits."""
    space = estimate.space
    pick = space.uniform(len(space.choices) - 1)
    free = budget - space.bytes_of(pick)
    for layer in rng.permutation(len(space)):
        prices = space.nbytes[layer] - space.nbytes[layer, -1]
        pick[layer] = rng.choice(np.flatnonzero(prices <= free))
        free -= int(prices[pick[layer]])
    return pick
