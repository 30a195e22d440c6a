"""Multi-start flip-and-swap local search for multiple-choice quadratic knapsacks."""

from __future__ import annotations

import numpy as np

from impq_core.space import FloatArray, IntArray
from impq_core.types import SensitivityEstimate

_TINY = 1e-12


def search(estimate: SensitivityEstimate, budget: int, starts: int, rng: np.random.Generator) -> IntArray:
    """The best pick (n,) found within ``budget`` bytes; the all-low pick must fit.

    Each start is improved until no change of one layer and no change of two layers together lowers the predicted loss
    within the budget. The first start is greedy; the others promote in random order.
    """
    space = estimate.space
    n, m = space.nbytes.shape
    best = descend(estimate, _greedy(estimate, budget), budget)
    value = estimate.score(best)[0]
    for _ in range(starts - 1):
        pick = space.uniform(m - 1)
        left = budget - space.bytes_of(pick)
        for layer in rng.permutation(n):
            fitting = np.flatnonzero(space.nbytes[layer] - space.nbytes[layer, -1] <= left)
            pick[layer] = rng.choice(fitting)
            left -= space.nbytes[layer, pick[layer]] - space.nbytes[layer, -1]
        pick = descend(estimate, pick, budget)
        if estimate.score(pick)[0] < value - _TINY:
            best, value = pick, estimate.score(pick)[0]
    return best


def descend(estimate: SensitivityEstimate, pick: IntArray, budget: int) -> IntArray:
    """Improve a pick by its best single or double change until there is none."""
    space = estimate.space
    n, m = space.nbytes.shape
    pick = pick.copy()
    layers = np.arange(n)
    same_layer = np.repeat(layers, m)[:, None] == np.repeat(layers, m)[None, :]
    while True:
        field = _field(estimate, pick)
        single = (field - field[layers, pick][:, None]).ravel()
        size = (space.nbytes - space.nbytes[layers, pick][:, None]).ravel()
        room = budget - space.bytes_of(pick)
        double = single[:, None] + single[None, :]
        if estimate.pairwise is not None:
            pairs = estimate.pairwise
            at = pairs[:, :, layers, pick]  # (n, m, n): with the other layer where it stands
            both = pairs[layers, pick][:, layers, pick]  # (n, n)
            double = double + (pairs - at[:, :, :, None] - at.transpose(2, 0, 1)[:, None]
                               + both[:, None, :, None]).reshape(n * m, n * m)
        double = np.where(same_layer | (size[:, None] + size[None, :] > room), np.inf, double)
        single = np.where(size > room, np.inf, single)
        one, two = int(single.argmin()), int(double.argmin())
        if min(single[one], double.flat[two]) >= -_TINY:
            return pick
        moves = [one] if single[one] <= double.flat[two] else list(divmod(two, n * m))
        for move in moves:
            pick[move // m] = move % m


def _field(estimate: SensitivityEstimate, pick: IntArray) -> FloatArray:
    """(n, m): predicted loss of each choice of each layer while the others stay, up to a constant a layer."""
    if estimate.pairwise is None:
        return estimate.linear
    field: FloatArray = estimate.linear + estimate.pairwise[:, :, np.arange(len(pick)), pick].sum(axis=2)
    return field


def _greedy(estimate: SensitivityEstimate, budget: int) -> IntArray:
    """From all-low, take the change that saves most predicted loss a byte, while one fits."""
    space = estimate.space
    n, m = space.nbytes.shape
    layers = np.arange(n)
    pick = space.uniform(m - 1)
    while True:
        field = _field(estimate, pick)
        saved = field[layers, pick][:, None] - field
        cost = space.nbytes - space.nbytes[layers, pick][:, None]
        rate = np.where((cost > 0) & (cost <= budget - space.bytes_of(pick)) & (saved > _TINY),
                        saved / np.maximum(cost, 1), -np.inf)
        best = int(rate.argmax())
        if rate.flat[best] == -np.inf:
            return pick
        pick[best // m] = best % m
