"""How well a surrogate tells losses it was not fitted to."""

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
"""Independent draws that a standard error of a difference between surrogates is made of."""

PAIR_GAMES, INDEPENDENT = 32, 1000
"""Random games of pairs, and at least so many independent picks, that tell what least squares takes for costs."""


@dataclass(frozen=True, eq=False)
class Ordering:
    """Which pairs of measurements of one size (equally many steps down) were put in the wrong order. Sizes differ
    trivially, and a plan has to choose among equals. Where the measurements know what budget plans are wanted for, only
    sizes near it are here (``NEAR``).

    Args:
        wrong: (P,) 1 where the order is wrong, 0.5 where it was left open.
        draws: int (P, 2) the independent draws of the two.
    """

    wrong: FloatArray
    draws: IntArray

    @property
    def share(self) -> float:
        """Of all pairs; 0.5 is a guess, NaN where there are none."""
        return float(self.wrong.mean()) if len(self.wrong) else np.nan

    def beyond(self, other: Ordering) -> tuple[float, float]:
        """This share minus that of another surrogate for the same measurements, and the standard error of the
        difference by the jackknife over independent draws; infinite where fewer than ``FEWEST_DRAWS`` tell."""
        difference, names = self.wrong - other.wrong, np.unique(self.draws)
        gain = self.share - other.share
        if len(names) < FEWEST_DRAWS:
            return gain, np.inf
        left = np.array([difference[(self.draws != one).all(axis=1)].mean() for one in names])
        spread = ((left - left.mean()) ** 2).sum() * (len(names) - 1) / len(names)
        return gain, float(np.sqrt(spread))


@dataclass(frozen=True)
class Validation:
    """A surrogate's predictions of held-out permutations.

    Args:
        error: root mean square error, nats per token.
        ordering: the pairs of measurements it puts in the wrong order.
        explained: share of the variance among measurements of one size that it explains; negative where it is worse
            than their mean. For an additive surrogate, 1 minus this is the share of interactions and noise.
    """

    error: float
    ordering: Ordering
    explained: float

    @property
    def misordered(self) -> float:
        """The share of those pairs."""
        return self.ordering.share


@dataclass(frozen=True)
class HigherOrder:
    """Shares of the variance of the loss, among random picks of one size, that are of order two and above: what is
    left of it by the best additive model of width steps, whatever surrogate is fitted (the certificate of
    arXiv 2607.12266). 0 is an additive game, whose ranking of layers says all; NaN where there are too few
    measurements to tell.

    Args:
        loss: of the loss itself.
        linked: after the best of the curves ``-c log(1 - loss/c)``, saturating (c > 0) or growing (c < 0), in the units
            of the loss as well: couplings of particular layers, which no plan's total damage explains.
    """

    loss: float
    linked: float


def higher_order_share(measurements: Measurements) -> HigherOrder:
    """How far a game is from additive; a property of the game, not of a surrogate.

    The picks of SPQE are random coalitions of every size. Sizes have means of their own and layers have costs common to
    all sizes, fitted by least squares; the variances left and whole are over the degrees of freedom they keep, so that
    an additive game has 0 with few permutations too. Picks of one path look alike, and least squares takes more of
    their interactions for costs than it would of independent picks': how much more is seen on random games of pairs.
    With four orders a share is right on average and within about half of itself; one pair of orders does not tell.

    Raises:
        ImpqError: a loss is not finite.
    """
    measurements.require_finite()
    told = measurements.part(_told(measurements))
    losses = told.losses
    if len(np.unique(told.replicate)) < 2:
        return HigherOrder(np.nan, np.nan)
    steps, sizes = _steps_and_sizes(told.space, told.picks)
    design, whole = np.concatenate([steps, sizes], axis=1), _unexplained(_basis(sizes), losses)
    if not whole > 0:
        return HigherOrder(np.nan, np.nan)
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(told.picks, (-(-INDEPENDENT // len(told)), 1)), axis=1)  # layers within a pick
    left = []
    for part in (shuffled, told.picks):
        taken, size = _steps_and_sizes(told.space, part)
        basis, draw = _basis(np.concatenate([taken, size], axis=1)), np.random.default_rng(1)
        # What a game of pairs holds of a step with itself or its layer's others is a cost, which the basis explains.
        left.append(sum(_unexplained(basis, ((taken @ draw.normal(size=(taken.shape[1],) * 2)) * taken).sum(axis=1))
                        for _ in range(PAIR_GAMES)))
    shares = []
    for rate in (0.0, *CURVES / np.abs(losses).max()):
        inside = 1.0 - rate * losses  # d loss = inside d score: with this weight the errors are the loss's
        if inside.min() > 0:
            scores = -np.log(inside) / rate if rate else losses
            rest = _unexplained(_basis(design * inside[:, None]), scores * inside)
            shares.append(min(1.0, rest / whole * left[0] / left[1]))
    return HigherOrder(shares[0], min(shares))


def _steps_and_sizes(space: SearchSpace, picks: IntArray) -> tuple[FloatArray, FloatArray]:
    """Columns of 0 and 1 for the width steps that picks have taken, and for their numbers of steps."""
    size = picks.sum(axis=1)
    return space.steps_taken(picks).reshape(len(picks), -1), (size[:, None] == np.unique(size)).astype(np.float64)


def _basis(design: FloatArray) -> FloatArray:
    """Orthonormal columns that span those of a design."""
    spread, vectors = np.linalg.eigh(design.T @ design)
    keep = spread > 1e-10 * spread[-1]
    basis: FloatArray = design @ (vectors[:, keep] / np.sqrt(spread[keep]))
    return basis


def _unexplained(basis: FloatArray, values: FloatArray) -> float:
    """Mean square that least squares leaves, over the degrees of freedom; NaN where there are none."""
    free = len(values) - basis.shape[1]
    return float(((values - basis @ (basis.T @ values)) ** 2).sum() / free) if free > 0 else np.nan


def _told(measurements: Measurements) -> IntArray:
    """Numbers of the measurements at sizes that more than one pick has: neither all-widest nor all-narrowest."""
    narrowest = len(measurements.space.choices) - 1
    return np.flatnonzero(measurements.picks.any(axis=1) & (measurements.picks.min(axis=1) < narrowest))


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
    guesses: FloatArray = np.empty(len(measurements))
    for kept, held in folds(measurements):
        guesses[held] = fit(measurements.part(kept)).predict(measurements.picks[held])
    told = np.intersect1d(_told(measurements), np.flatnonzero(near_budget(measurements)))
    size, losses, seen = measurements.picks[told].sum(axis=1), measurements.losses[told], guesses[told]
    pairs: list[IntArray] = [np.empty((0, 2), dtype=np.int64)]
    left, whole = 0.0, 0.0
    for one in np.unique(size):
        here = np.flatnonzero(size == one)
        right, said = losses[here], seen[here]
        pairs.append(here[np.stack(np.triu_indices(len(here), 1), axis=1)])
        left += float(((right - right.mean() - (said - said.mean())) ** 2).sum())
        whole += float(((right - right.mean()) ** 2).sum())
    every = np.concatenate(pairs)
    truth, guess = (np.sign(np.subtract(*values[every].T)) for values in (losses, seen))
    told_apart = truth != 0  # the same pick twice has no order
    ordering = Ordering((0.5 - 0.5 * truth * guess)[told_apart], measurements.replicate[told][every[told_apart]])
    return Validation(_rms(seen - losses), ordering, 1 - left / whole if whole else np.nan)


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
