"""Cross-validation of surrogates, and the share of a game's variance that no additive model explains.

Losses on different sets of calibration windows differ by their texts. All comparisons are within a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.space import BoolArray, FloatArray, IntArray, SearchSpace
from impq_core.types import Measurements, SensitivityEstimate

FOLDS = 5
"""Largest number of folds of a cross-validation."""

NEAR = 0.25
"""Largest distance of a size near the budget, relative to the range from the smallest to the largest plan."""

CURVES = np.concatenate([1.0 / (1.0 + 10.0 ** np.linspace(-2.0, 2.0, 25)), -(10.0 ** np.linspace(-2.0, 1.0, 19))])
"""Curves that ``higher_order_share`` tries; each number is the largest loss divided by the curve's ceiling c."""

FEWEST_DRAWS = 5
"""Fewest independent draws for a standard error of the difference between two surrogates."""

FEWEST_FREE = 8
"""Fewest degrees of freedom for a share of higher order; its relative standard error is then about a half."""

RANDOM_GAMES, RANDOM_PICKS = 32, 1000
"""Number of random games of pairs, and least number of random picks, in ``_bias_correction``."""


@dataclass(frozen=True, eq=False)
class Ordering:
    """The pairs of measurements that a surrogate puts in the wrong order.

    The two measurements of a pair have equal size (equally many steps down) and the same windows: any surrogate orders
    picks of different sizes correctly, and losses on different windows differ by their texts. If the measurements have
    a budget, only sizes near it count (``NEAR``).

    Args:
        wrong: (P,) 1 if the order is wrong, 0.5 if the two predictions are equal, else 0.
        draws: int (P, 2) the independent draws of the two measurements.
    """

    wrong: FloatArray
    draws: IntArray

    @property
    def share(self) -> float:
        """Share of pairs in the wrong order: 0.5 for random predictions, NaN without pairs."""
        return float(self.wrong.mean()) if len(self.wrong) else np.nan

    def minus(self, other: Ordering) -> tuple[float, float]:
        """This share minus the share of another surrogate for the same measurements, and its standard error by the
        jackknife over independent draws; the error is infinite with fewer than ``FEWEST_DRAWS`` draws."""
        differences, draws = self.wrong - other.wrong, np.unique(self.draws)
        difference = self.share - other.share
        if len(draws) < FEWEST_DRAWS:
            return difference, np.inf
        without = np.array([differences[(self.draws != draw).all(axis=1)].mean() for draw in draws])  # a draw left out
        variance = ((without - without.mean()) ** 2).sum() * (len(draws) - 1) / len(draws)
        return difference, float(np.sqrt(variance))


@dataclass(frozen=True)
class Validation:
    """A surrogate's predictions of held-out permutations.

    Args:
        error: root mean square error, nats per token; it includes the noise between sets of windows.
        ordering: the pairs of measurements in the wrong order.
        explained: explained share of the variance among measurements of equal size and one set of windows; negative if
            predictions are worse than the mean. For an additive surrogate, the rest is interactions and noise.
    """

    error: float
    ordering: Ordering
    explained: float

    @property
    def misordered(self) -> float:
        """Share of the pairs of ``ordering`` in the wrong order."""
        return self.ordering.share


@dataclass(frozen=True)
class HigherOrder:
    """Shares of the variance of the loss, among random picks of equal size, of order two and above.

    They are the residual of the best additive model of width steps (the certificate of arXiv 2607.12266): 0 for an
    additive game, which a ranking of layers describes fully; NaN if there are too few measurements.

    Args:
        loss: share for the loss itself.
        linked: share after the best of the curves ``-c log(1 - loss/c)``, saturating (c > 0) or growing (c < 0), with
            residuals in the unit of the loss. It measures the interactions of particular layers, which no function of
            one total explains.
    """

    loss: float
    linked: float


def higher_order_share(measurements: Measurements) -> HigherOrder:
    """The shares of order two and above in the variance of a game; a property of the game, not of a surrogate.

    The picks of SPQE are random coalitions of every size. Within each set of windows, least squares fits a mean for
    each size and a cost for each width step. Variances are over the remaining degrees of freedom, so the share of an
    additive game is 0 even with few permutations, and if its costs differ between sets of windows. Picks of one path,
    or of an order and its reverse, are not independent: least squares explains more of their interactions by costs
    than it does for independent picks. Random games of pairs give the factor (``_bias_correction``).

    The share is NaN if there are fewer than two independent draws, if every set of windows has only one order (fresh
    windows without antithetic pairs), or if fewer than ``FEWEST_FREE`` degrees of freedom remain. With four orders the
    share is unbiased, with a relative standard error of about a half.

    Raises:
        ImpqError: a loss is not finite.
    """
    measurements.require_finite()
    inner = measurements.part(_inner(measurements))
    losses = inner.losses
    if len(np.unique(inner.replicate)) < 2:
        return HigherOrder(np.nan, np.nan)
    design = _Design(inner.space, inner.picks, inner.windows)
    total = design.variance(losses, additive=False)
    rounding = (1e-12 * float(np.abs(losses).max())) ** 2
    if design.free < FEWEST_FREE or not total > rounding:
        return HigherOrder(np.nan, np.nan)
    correction = _bias_correction(design)
    shares = []
    for rate in (0.0, *CURVES / np.abs(losses).max()):
        slope = 1.0 - rate * losses  # d loss = slope d score: this weight turns errors of scores into errors of losses
        if slope.min() > 0:
            scores = -np.log(slope) / rate if rate else losses
            residual = design.variance(scores * slope, weights=slope)
            shares.append(min(1.0, residual / total * correction))
    return HigherOrder(shares[0], min(shares))


class _Design:
    """Design matrix of least squares over picks: in each set of windows, columns for the mean of each size and for the
    cost of each width step.

    Args:
        space: the space of the picks.
        picks: (N, n).
        windows: (N,) number of the set of each pick.
    """

    def __init__(self, space: SearchSpace, picks: IntArray, windows: IntArray) -> None:
        self.space, self.picks = space, picks
        size = picks.sum(axis=1)
        self.steps = space.steps_taken(picks).reshape(len(picks), -1)  # (N, n (m-1))
        self._sizes = (size[:, None] == np.unique(size)).astype(np.float64)  # (N, sizes)
        self._sets = [np.flatnonzero(windows == number) for number in np.unique(windows)]
        self._bases: dict[bool, list[FloatArray]] = {
            additive: [self._basis(rows, additive, None) for rows in self._sets] for additive in (False, True)}

    @property
    def free(self) -> int:
        """Number of picks minus the degrees of freedom of sizes and steps."""
        return len(self.picks) - sum(basis.shape[1] for basis in self._bases[True])

    def variance(self, values: FloatArray, additive: bool = True, weights: FloatArray | None = None) -> float:
        """Residual sum of squares over degrees of freedom; NaN if there are none.

        Args:
            values: (N,), or (N, games) for the sum over games.
            additive: fit a cost for every step and a mean for every size; if false, only the means.
            weights: (N,) factors of the rows of the design.
        """
        square, free = 0.0, 0
        for number, rows in enumerate(self._sets):
            basis = self._bases[additive][number] if weights is None else self._basis(rows, additive, weights)
            residuals = values[rows] - basis @ (basis.T @ values[rows])
            square += float((residuals ** 2).sum())
            free += len(rows) - basis.shape[1]
        return square / free if free > 0 else np.nan

    def _basis(self, rows: IntArray, additive: bool, weights: FloatArray | None) -> FloatArray:
        """Orthonormal columns (rows, rank) with the span of the design."""
        columns = np.concatenate([self.steps, self._sizes], axis=1)[rows] if additive else self._sizes[rows]
        if weights is not None:
            columns = columns * weights[rows, None]
        eigenvalues, vectors = np.linalg.eigh(columns.T @ columns)
        keep = eigenvalues > 1e-10 * eigenvalues[-1]
        basis: FloatArray = columns @ (vectors[:, keep] / np.sqrt(eigenvalues[keep]))
        return basis


def _bias_correction(design: _Design) -> float:
    """Residual variance of random games of pairs for independent random picks, divided by that for a design's picks."""
    rng = np.random.default_rng(0)
    copies = -(-RANDOM_PICKS // len(design.picks))
    shuffled = rng.permuted(np.tile(design.picks, (copies, 1)), axis=1)  # layers within a pick, which keeps its size
    independent = _Design(design.space, shuffled, np.zeros(len(shuffled), dtype=np.int64))
    couplings = np.random.default_rng(1).normal(size=(RANDOM_GAMES, *(design.steps.shape[1],) * 2))

    def residual(picks: _Design) -> float:
        # Products of steps of one layer are functions of that layer alone, which the additive fit removes.
        losses = [((picks.steps @ coupling) * picks.steps).sum(axis=1) for coupling in couplings]
        return picks.variance(np.stack(losses, axis=1))

    return residual(independent) / residual(design)


def _inner(measurements: Measurements) -> IntArray:
    """Row numbers of the measurements that are neither all-widest nor all-narrowest: several picks have their size."""
    narrowest = len(measurements.space.choices) - 1
    return np.flatnonzero(measurements.picks.any(axis=1) & (measurements.picks.min(axis=1) < narrowest))


def folds(measurements: Measurements) -> Iterator[tuple[IntArray, IntArray]]:
    """Row numbers kept and held out in each fold. Folds are whole replicates, or paths if there is one replicate.

    Raises:
        ImpqError: there is only one path.
    """
    groups = measurements.replicate if len(np.unique(measurements.replicate)) > 1 else measurements.path
    numbers = np.unique(groups)
    if len(numbers) < 2:
        raise ImpqError("cross-validation needs at least 2 permutations")
    for held in np.array_split(numbers, min(FOLDS, len(numbers))):
        inside = np.isin(groups, held)
        yield np.flatnonzero(~inside), np.flatnonzero(inside)


def validate(fit: Callable[[Measurements], SensitivityEstimate], measurements: Measurements) -> Validation:
    """Cross-validate a surrogate: predict each fold by a fit to the other folds.

    Args:
        fit: fits the surrogate.
        measurements: all measurements; ``error`` and ``ordering`` are of those near the budget, if there is one.

    Raises:
        ImpqError: there is only one permutation, or the surrogate cannot be fitted.
    """
    predicted: FloatArray = np.empty(len(measurements))
    for kept, held in folds(measurements):
        predicted[held] = fit(measurements.part(kept)).predict(measurements.picks[held])
    rows = np.intersect1d(_inner(measurements), np.flatnonzero(near_budget(measurements)))
    losses, predictions, draws = measurements.losses[rows], predicted[rows], measurements.replicate[rows]  # (N,) each
    size_and_set = np.stack([measurements.picks[rows].sum(axis=1), measurements.windows[rows]], axis=1)  # (N, 2)
    pairs_of_groups: list[IntArray] = [np.empty((0, 2), dtype=np.int64)]
    residual, total = 0.0, 0.0  # sums of squares within groups of one size and one set of windows
    for group in np.unique(size_and_set, axis=0):
        members = np.flatnonzero((size_and_set == group).all(axis=1))
        loss, prediction = (values[members] - values[members].mean() for values in (losses, predictions))
        pairs_of_groups.append(members[np.stack(np.triu_indices(len(members), 1), axis=1)])
        residual += float(((loss - prediction) ** 2).sum())
        total += float((loss**2).sum())
    pairs = np.concatenate(pairs_of_groups)  # (P, 2)
    loss_sign, predicted_sign = (np.sign(np.subtract(*values[pairs].T)) for values in (losses, predictions))
    ordered = loss_sign != 0  # equal losses, such as those of the same pick, have no order
    ordering = Ordering((0.5 - 0.5 * loss_sign * predicted_sign)[ordered], draws[pairs[ordered]])
    error = float(np.sqrt(((predictions - losses) ** 2).mean()))
    return Validation(error, ordering, 1 - residual / total if total else np.nan)


def near_budget(measurements: Measurements) -> BoolArray:
    """(N,) whether the size of each measured pick, in stored bytes with pinned layers, is near the budget; all true if
    there is no budget or no size is near it."""
    space = measurements.space
    if measurements.budget_bytes is None:
        return np.ones(len(measurements), dtype=bool)
    sizes = space.bytes_of_all(measurements.picks)
    near: BoolArray = np.abs(sizes - measurements.budget_bytes) <= NEAR * (space.high_bytes - space.low_bytes)
    return near if near.any() else np.ones(len(measurements), dtype=bool)
