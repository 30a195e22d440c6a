"""How well a surrogate tells losses it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.space import BoolArray, FloatArray, IntArray
from impq_core.types import Measurements, SensitivityEstimate

FOLDS = 5

NEAR = 0.25
"""Sizes count as near a budget up to this share of the way from the smallest to the largest plan."""


@dataclass(frozen=True)
class Validation:
    """A surrogate's predictions of held-out permutations.

    Args:
        error: root mean square error, nats per token.
        misordered: share of pairs of measurements of one size (equally many steps down) that it puts in the wrong
            order; 0.5 is a guess. Sizes differ trivially, and a plan has to choose among equals. Where the
            measurements know what budget plans are wanted for, only sizes near it count (``NEAR``).
        explained: share of the variance among measurements of one size that it explains; negative where it is worse
            than their mean. For an additive surrogate, 1 minus this is the share of interactions and noise.
    """

    error: float
    misordered: float
    explained: float


def folds(measurements: Measurements) -> Iterator[tuple[IntArray, IntArray]]:
    """Numbers of the measurements kept and held out, by whole replicates (by paths where there is one replicate).

    Raises:
        ImpqError: there is only one path.
    """
    groups = measurements.replicate if len(np.unique(measurements.replicate)) > 1 else measurements.path
    names = np.unique(groups)
    if len(names) < 2:
        raise ImpqError("cross-validation needs at least 2 permutations")
    for held in np.array_split(names, min(FOLDS, len(names))):
        inside = np.isin(groups, held)
        yield np.flatnonzero(~inside), np.flatnonzero(inside)


def validate(fit: Callable[[Measurements], SensitivityEstimate], measurements: Measurements) -> Validation:
    """Fit to all folds but one and predict that one, for each.

    Raises:
        ImpqError: there are too few permutations to leave some out.
    """
    guesses = np.empty(len(measurements))
    for kept, held in folds(measurements):
        guesses[held] = fit(measurements.part(kept)).predict(measurements.picks[held])
    told = measurements.picks.any(axis=1) & (measurements.picks.min(axis=1) < len(measurements.space.choices) - 1)
    told &= near_budget(measurements)
    size, losses, seen = measurements.picks[told].sum(axis=1), measurements.losses[told], guesses[told]
    wrong, pairs, left, whole = 0.0, 0, 0.0, 0.0
    for one in np.unique(size):
        here = size == one
        right, said = losses[here], seen[here]
        a, b = np.triu_indices(len(right), 1)
        a, b = a[right[a] != right[b]], b[right[a] != right[b]]  # the same pick twice has no order
        order = np.sign(right[a] - right[b]) * np.sign(said[a] - said[b])
        wrong += float((order < 0).sum() + 0.5 * (order == 0).sum())
        pairs += len(a)
        left += float(((right - right.mean() - (said - said.mean())) ** 2).sum())
        whole += float(((right - right.mean()) ** 2).sum())
    return Validation(_rms(seen - losses), wrong / pairs if pairs else np.nan, 1 - left / whole if whole else np.nan)


def near_budget(measurements: Measurements) -> BoolArray:
    """Which measurements (N,) are of sizes near the budget that plans are wanted for: all where that is unknown, or
    where none is near."""
    space = measurements.space
    if measurements.budget_bytes is None:
        return np.ones(len(measurements), dtype=bool)
    sizes = space.nbytes[np.arange(len(space)), measurements.picks].sum(axis=1)
    near: BoolArray = np.abs(sizes - measurements.budget_bytes) <= NEAR * (space.high_bytes - space.low_bytes)
    return near if near.any() else np.ones(len(measurements), dtype=bool)


def _rms(values: FloatArray) -> float:
    return float(np.sqrt((values**2).mean()))
