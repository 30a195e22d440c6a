"""Multi-start flip-and-swap local search for multiple-choice quadratic knapsacks.

The search has no threshold that depends on the scale of the scores. A change is made only if it lowers the computed
score of the whole pick, so no pick occurs twice and the search ends.
"""

from __future__ import annotations

import numpy as np

from impq_core.greedy import changes, demote, promote
from impq_core.space import IntArray
from impq_core.types import SensitivityEstimate


def search(estimate: SensitivityEstimate, budget: int, starts: int, rng: np.random.Generator) -> IntArray:
    """The best pick (n,) of all starts within ``budget`` bytes.

    Each start is improved until no change of one or two layers within the budget lowers the score. The greedy plans
    are among the starts, so the result is never worse than either; the other starts are random.

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
    """Improve a pick by its best change of one or two layers until no change lowers its score. Changes are numbered
    ``layer * m + choice``."""
    space = estimate.space
    n, m = space.nbytes.shape
    layers = np.arange(n)
    same_layer = np.repeat(layers, m)[:, None] == np.repeat(layers, m)[None, :]
    score = float(estimate.score(pick)[0])
    while True:
        added, grown = changes(estimate, pick)  # (n, m) score and bytes
        single, size = added.ravel(), grown.ravel()
        room = budget - space.bytes_of(pick)
        double = single[:, None] + single[None, :]
        if estimate.pairwise is not None:
            pairs = estimate.pairwise
            one_changed = pairs[:, :, layers, pick]  # (n, m, n): the second layer at its choice in the pick
            unchanged = pairs[layers, pick][:, layers, pick]  # (n, n): both layers at their choices in the pick
            double = double + (pairs - one_changed[:, :, :, None] - one_changed.transpose(2, 0, 1)[:, None]
                               + unchanged[:, None, :, None]).reshape(n * m, n * m)
        double = np.where(same_layer | (size[:, None] + size[None, :] > room), np.inf, double)
        single = np.where(size > room, np.inf, single)
        best_single, best_double = int(single.argmin()), int(double.argmin())
        best_changes = ([best_single] if single[best_single] <= double.flat[best_double]
                        else list(divmod(best_double, n * m)))
        changed = pick.copy()
        for change in best_changes:
            changed[change // m] = change % m
        changed_score = float(estimate.score(changed)[0])
        if not changed_score < score:  # no improvement beyond rounding
            return pick
        pick, score = changed, changed_score


def _random_start(estimate: SensitivityEstimate, budget: int, rng: np.random.Generator) -> IntArray:
    """A random pick: from all-narrowest, each layer in random order takes a random choice that fits the budget."""
    space = estimate.space
    pick = space.uniform(len(space.choices) - 1)
    room = budget - space.bytes_of(pick)
    for layer in rng.permutation(len(space)):
        sizes = space.nbytes[layer] - space.nbytes[layer, -1]
        pick[layer] = rng.choice(np.flatnonzero(sizes <= room))
        room -= int(sizes[pick[layer]])
    return pick
