"""How well a surrogate predicts losses it was not fitted to, and how far a game is from additive.

Losses on different sets of calibration windows differ by their texts. Everything here compares losses within a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.space import BoolArray, FloatArray, IntArray, SearchSpace
from impq_core.types import Measurements, SensitivityEstimate

FOLDS = 5

NEAR = 0.25
"""Sizes count as near a budget up to this share of the way from the smallest to the largest plan."""

CURVES = np.concatenate([1.0 / (1.0 + 10.0 ** np.linspace(-2.0, 2.0, 25)), -(10.0 ** np.linspace(-2.0, 1.0, 19))])
"""The largest loss over the ceilings c of the curves tried."""

FEWEST_DRAWS = 5
"""Fewest independent draws for a standard error of the difference between two surrogates."""

FEWEST_FREE = 8
"""Fewest degrees of freedom for a share of higher order: its relative standard error is then about a half."""

RANDOM_GAMES, RANDOM_PICKS = 32, 1000
"""Random games of pairs, and fewest random picks, that calibrate the residuals of a design (``_calibration``)."""


@dataclass(frozen=True, eq=False)
class Ordering:
    """Which pairs of measurements a surrogate puts in the wrong order. Pairs are of one size (equally many steps down)
    and one set of windows: sizes differ trivially, and sets by their texts. If the measurements have a budget, only
    sizes near it count (``NEAR``).

    Args:
        wrong: (P,) 1 if the order is wrong, 0.5 if the surrogate ties the two, else 0.
        draws: int (P, 2) the independent draws of the two.
    """

    wrong: FloatArray
    draws: IntArray

    @property
    def share(self) -> float:
        """Share of pairs in the wrong order; 0.5 is a guess, NaN without pairs."""
        return float(self.wrong.mean()) if len(self.wrong) else np.nan

    def beyond(self, other: Ordering) -> tuple[float, float]:
        """This share minus another surrogate's for the same measurements, and the standard error of the difference by
        the jackknife over independent draws; the error is infinite with fewer than ``FEWEST_DRAWS`` draws."""
        difference, draws = self.wrong - other.wrong, np.unique(self.draws)
        gain = self.share - other.share
        if len(draws) < FEWEST_DRAWS:
            return gain, np.inf
        without = np.array([difference[(self.draws != draw).all(axis=1)].mean() for draw in draws])
        spread = ((without - without.mean()) ** 2).sum() * (len(draws) - 1) / len(draws)
        return gain, float(np.sqrt(spread))


@dataclass(frozen=True)
class Validation:
    """A surrogate's predictions of held-out permutations.

    Args:
        error: root mean square error, nats per token; between sets of windows it includes their noise.
        ordering: the pairs of measurements it puts in the wrong order.
        explained: share of the variance among measurements of one size and one set of windows that it explains;
            negative if it is worse than their mean. For an additive surrogate, 1 minus this is the share of
            interactions and noise.
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
    """Shares of the variance of the loss, among random picks of one size, that are of order two and above: the residual
    of the best additive model of width steps (the certificate of arXiv 2607.12266). 0 is an additive game, which a
    ranking of layers describes fully; NaN if there are too few measurements.

    Args:
        loss: of the loss itself.
        linked: after the best of the curves ``-c log(1 - loss/c)``, saturating (c > 0) or growing (c < 0), in the units
            of the loss as well: couplings of particular layers, which no function of the total damage explains.
    """

    loss: float
    linked: float


def higher_order_share(measurements: Measurements) -> HigherOrder:
    """How far a game is from additive; a property of the game, not of a surrogate.

    The picks of SPQE are random coalitions of every size. Within each set of windows, least squares fits a mean for
    each size and a cost for each width step; variances are over the remaining degrees of freedom, so an additive game
    has share 0 with few permutations too, also if its costs differ between sets of windows. Picks of one path, or of an
    order and its reverse, are not independent, and least squares takes more of their interactions for costs than of
    those of independent picks: random games of pairs show how much more (``_calibration``).

    The share is NaN if there are fewer than two independent draws, if each set of windows holds one order only (fresh
    windows without antithetic pairs), or if fewer than ``FEWEST_FREE`` degrees of freedom remain. With four orders a
    share is right on average and within about half of itself.

    Raises:
        ImpqError: a loss is not finite.
    """
    measurements.require_finite()
    inner = measurements.part(_inner(measurements))
    losses = inner.losses
    if len(np.unique(inner.replicate)) < 2:
        return HigherOrder(np.nan, np.nan)
    design = _Design(inner.space, inner.picks, inner.windows)
    whole = design.variance(losses, additive=False)
    rounding = (1e-12 * float(np.abs(losses).max())) ** 2
    if design.free < FEWEST_FREE or not whole > rounding:
        return HigherOrder(np.nan, np.nan)
    calibration = _calibration(design)
    shares = []
    for rate in (0.0, *CURVES / np.abs(losses).max()):
        slope = 1.0 - rate * losses  # d loss = slope d score: with this weight the errors are those of the loss
        if slope.min() > 0:
            scores = -np.log(slope) / rate if rate else losses
            residual = design.variance(scores * slope, weights=slope)
            shares.append(min(1.0, residual / whole * calibration))
    return HigherOrder(shares[0], min(shares))


class _Design:
    """Columns of least squares over picks: in each set of windows a mean for each size and a cost for each width step.

    Args:
        space: of the picks.
        picks: (N, n).
        windows: (N,) numbers of the sets.
    """

    def __init__(self, space: SearchSpace, picks: IntArray, windows: IntArray) -> None:
        self.space, self.picks = space, picks
        size = picks.sum(axis=1)
        self.steps = space.steps_taken(picks).reshape(len(picks), -1)
        self._sizes = (size[:, None] == np.unique(size)).astype(np.float64)
        self._sets = [np.flatnonzero(windows == number) for number in np.unique(windows)]
        self._bases: dict[bool, list[FloatArray]] = {
            additive: [self._basis(rows, additive, None) for rows in self._sets] for additive in (False, True)}

    @property
    def free(self) -> int:
        """Degrees of freedom that sizes and steps leave."""
        return len(self.picks) - sum(basis.shape[1] for basis in self._bases[True])

    def variance(self, values: FloatArray, additive: bool = True, weights: FloatArray | None = None) -> float:
        """Residual sum of squares over degrees of freedom; NaN if there are none.

        Args:
            values: (N,), or (N, games) to sum over games.
            additive: fit the cost of every step beside the mean of every size.
            weights: (N,) factors of the rows of the design.
        """
        square, free = 0.0, 0
        for number, rows in enumerate(self._sets):
            basis = self._bases[additive][number] if weights is None else self._basis(rows, additive, weights)
            square += float(((values[rows] - basis @ (basis.T @ values[rows])) ** 2).sum())
            free += len(rows) - basis.shape[1]
        return square / free if free > 0 else np.nan

    def _basis(self, rows: IntArray, additive: bool, weights: FloatArray | None) -> FloatArray:
        """Orthonormal columns (rows, rank) that span the design."""
        columns = np.concatenate([self.steps, self._sizes], axis=1)[rows] if additive else self._sizes[rows]
        if weights is not None:
            columns = columns * weights[rows, None]
        spread, vectors = np.linalg.eigh(columns.T @ columns)
        keep = spread > 1e-10 * spread[-1]
        basis: FloatArray = columns @ (vectors[:, keep] / np.sqrt(spread[keep]))
        return basis


def _calibration(design: _Design) -> float:
    """Residual variance of random games of pairs among independent random picks, over that among a design's picks."""
    rng = np.random.default_rng(0)
    copies = -(-RANDOM_PICKS // len(design.picks))
    shuffled = rng.permuted(np.tile(design.picks, (copies, 1)), axis=1)  # layers within a pick: sizes stay
    independent = _Design(design.space, shuffled, np.zeros(len(shuffled), dtype=np.int64))
    couplings = np.random.default_rng(1).normal(size=(RANDOM_GAMES, *(design.steps.shape[1],) * 2))
    # A step's product with itself, or with the layer's other step, is a function of one layer: a cost, not a pair.
    residuals = [part.variance(np.stack([((part.steps @ coupling) * part.steps).sum(axis=1)
                                         for coupling in couplings], axis=1)) for part in (independent, design)]
    return residuals[0] / residuals[1]


def _inner(measurements: Measurements) -> IntArray:
    """Row numbers of the measurements whose size several picks have: neither all-widest nor all-narrowest."""
    narrowest = len(measurements.space.choices) - 1
    return np.flatnonzero(measurements.picks.any(axis=1) & (measurements.picks.min(axis=1) < narrowest))


def folds(measurements: Measurements) -> Iterator[tuple[IntArray, IntArray]]:
    """Row numbers kept and held out, by whole replicates (by paths if there is one replicate).

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
    """Fit to all folds but one and predict that one, for each fold.

    Raises:
        ImpqError: there are too few permutations to hold some out.
    """
    predicted: FloatArray = np.empty(len(measurements))
    for kept, held in folds(measurements):
        predicted[held] = fit(measurements.part(kept)).predict(measurements.picks[held])
    rows = np.intersect1d(_inner(measurements), np.flatnonzero(near_budget(measurements)))
    losses, guesses, draws = measurements.losses[rows], predicted[rows], measurements.replicate[rows]
    size_and_set = np.stack([measurements.picks[rows].sum(axis=1), measurements.windows[rows]], axis=1)
    groups = np.unique(size_and_set, axis=0)
    pairs: list[IntArray] = [np.empty((0, 2), dtype=np.int64)]
    residual, whole = 0.0, 0.0
    for group in groups:
        members = np.flatnonzero((size_and_set == group).all(axis=1))
        true, guess = (values[members] - values[members].mean() for values in (losses, guesses))
        pairs.append(members[np.stack(np.triu_indices(len(members), 1), axis=1)])
        residual += float(((true - guess) ** 2).sum())
        whole += float((true**2).sum())
    every = np.concatenate(pairs)
    true, guess = (np.sign(np.subtract(*values[every].T)) for values in (losses, guesses))
    ordered = true != 0  # equal losses, such as those of the same pick, have no order
    ordering = Ordering((0.5 - 0.5 * true * guess)[ordered], draws[every[ordered]])
    error = float(np.sqrt(((guesses - losses) ** 2).mean()))
    return Validation(error, ordering, 1 - residual / whole if whole else np.nan)


def near_budget(measurements: Measurements) -> BoolArray:
    """Which measurements (N,) have sizes near the budget, in stored bytes, pinned layers included; all of them if there
    is no budget or none is near it."""
    space = measurements.space
    if measurements.budget_bytes is None:
        return np.ones(len(measurements), dtype=bool)
    sizes = space.bytes_of_all(measurements.picks)
    near: BoolArray = np.abs(sizes - measurements.budget_bytes) <= NEAR * (space.high_bytes - space.low_bytes)
    return near if near.any() else np.ones(len(measurements), dtype=bool)
