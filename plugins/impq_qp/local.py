"""Multi-start flip-and-swap local search for multiple-choice quadratic knapsacks.

The search has no threshold that depends on the scale of the scores. A change is made only if it lowers the computed
score of the whole pick, so no pick occurs twice and the search ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from impq_core.costs import Cost
from impq_core.feasible import any_fitting, least
from impq_core.greedy import changes, demote, promote, within
from impq_core.space import IntArray
from impq_core.types import SensitivityEstimate


def search(estimate: SensitivityEstimate, budget: int, starts: int, rng: np.random.Generator,
           limits: Sequence[Cost] = ()) -> IntArray:
    """The best pick (n,) of all starts within ``budget`` bytes and within limits.

    Each start is improved until no change of one or two layers within the budget lowers the score. The greedy plans
    are among the starts, so the result is never worse than either; with limits also the best plan by the linear terms.
    The other starts are random.

    Raises:
        ImpqError: the budget is below the smallest plan, or no plan is within budget and limits.
    """
    best = descend(estimate, promote(estimate, budget, limits), budget, limits)
    value = float(estimate.score(best)[0])
    fitting = any_fitting(estimate.space, budget, limits)
    first = [demote(estimate, budget, limits)]
    if limits and (linear := least(estimate.space, estimate.linear, budget, limits)) is not None:
        first.append(linear)
    for number in range(max(starts, len(first))):
        start = first[number] if number < len(first) else _random_start(estimate, budget, rng, fitting, limits)
        pick = descend(estimate, start, budget, limits)
        score = float(estimate.score(pick)[0])
        if score < value:
            best, value = pick, score
    return best


def descend(estimate: SensitivityEstimate, pick: IntArray, budget: int, limits: Sequence[Cost] = ()) -> IntArray:
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
        for cost in limits:
            taken, left = cost.grown(pick).ravel(), cost.room(pick)
            double[taken[:, None] + taken[None, :] > left] = np.inf
        single = np.where((size > room) | ~np.broadcast_to(within(limits, pick), (n, m)).ravel(), np.inf, single)
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


def _random_start(estimate: SensitivityEstimate, budget: int, rng: np.random.Generator, fitting: IntArray,
                  limits: Sequence[Cost]) -> IntArray:
    """A random pick: from one that fits, such as all-narrowest, each layer in random order takes a random choice with
    which it still fits."""
    space = estimate.space
    pick = fitting.copy()
    for layer in rng.permutation(len(space)):
        open_choices = space.nbytes[layer] - space.nbytes[layer, pick[layer]] <= budget - space.bytes_of(pick)
        for cost in limits:
            open_choices = open_choices & (cost.grown(pick)[layer] <= cost.room(pick))
        open_choices[pick[layer]] = True
        pick[layer] = rng.choice(np.flatnonzero(open_choices))
    return pick
