"""Exchanges of widths by Thompson sampling: a Bayesian model of the layers' costs, updated by every measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from impq_core.costs import Cost, limited
from impq_core.greedy import within
from impq_core.interfaces import Game, Refiner
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.types import Plan, SensitivityEstimate
from impq_refine.judge import Incumbent

PATIENCE = 200
"""Draws in a row without a new pick before the search ends."""

UNKNOWN = 0.1
"""Assumed loss from all-widest to all-narrowest if there is no estimate, nats per token."""

WEIGHT = 3.0
"""Number of measurements that the initial standard deviation counts as."""


@dataclass(frozen=True)
class Options:
    """Options of the swaps.

    Args:
        moves: largest number of layers that one proposal changes.
        doubt: initial standard deviation of a cost, relative to the spread of the estimate's costs.
    """

    moves: int = 6
    doubt: float = 0.5

    def __post_init__(self) -> None:
        if self.moves < 2 or self.doubt <= 0:
            raise ValueError("moves must be at least 2, doubt must be positive")


class Swaps(Refiner):
    """Thompson sampling over exchanges of widths near the plan.

    The prior of each layer's cost at each width is normal, with the estimate as its mean. A draw from the posterior
    proposes the few changes that lower the drawn cost the most within the budget. The measured difference of the loss,
    with its error over windows, updates the posterior (Bayesian linear regression). A pick that wins in the game is
    also measured on the referee's windows. If a loss is not finite, the posterior stays as it is, and that pick is not
    proposed again.
    """

    Options = Options
    takes_limits = True

    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: np.random.Generator) -> Plan:
        """A plan within the budget, no worse on the referee's windows."""
        space = plan.space
        incumbent = Incumbent(plan.pick, game, referee, forwards)
        belief = Belief(local_costs(space, estimate, plan.pick), self.options.doubt)
        idle = 0
        while incumbent.may_go_on and idle < PATIENCE:
            pick = improve(space, belief.draw(rng), incumbent.pick, plan.budget_bytes,
                           int(rng.integers(2, self.options.moves + 1)), limited(plan.costs))
            if pick.tobytes() in incumbent.measured:
                idle += 1
                continue
            idle = 0
            mean, stderr = incumbent.measure(pick)
            if np.isfinite(mean):
                belief.learn(incumbent.pick, pick, mean, stderr)
            if mean < 0:
                incumbent.challenge(pick)
        predicted = float(estimate.predict(incumbent.pick)[0]) if estimate else None
        return replace(plan, pick=incumbent.pick, predicted_loss=predicted, bound=None,
                       method=f"{plan.method} + swaps({incumbent.taken} taken)")


def local_costs(space: SearchSpace, estimate: SensitivityEstimate | None, pick: IntArray) -> FloatArray:
    """(n, m): the cost of each choice of each layer with the other layers at the pick, nats per token.

    Without an estimate, costs are proportional to the squared error of rounding and add up to ``UNKNOWN`` from
    all-widest to all-narrowest.
    """
    n, m = space.nbytes.shape
    rows = np.arange(n)
    if estimate is None:
        return UNKNOWN / n * space.rounding_errors
    moved = np.tile(pick, (n, m, 1))  # (n, m, n): the pick with layer i at choice k
    moved[rows[:, None], np.arange(m), rows[:, None]] = np.arange(m)
    return estimate.predict(moved.reshape(n * m, n)).reshape(n, m)


class Belief:
    """Normal posterior of the costs (n, m), given measured differences of losses.

    Args:
        costs: mean of the prior.
        doubt: standard deviation of the prior, relative to the spread of the cost steps between neighbouring widths.
    """

    def __init__(self, costs: FloatArray, doubt: float) -> None:
        self._mean = costs
        steps = np.diff(costs, axis=1)
        spread = max(float(steps.std()), float(np.abs(steps).mean()))
        self._sd = doubt * (spread or UNKNOWN / steps.size)  # if all choices cost the same, the scale is unknown
        self._features: list[FloatArray] = []  # (n m,) each: 1 at the new choices, -1 at the former ones
        self._differences: list[float] = []
        self._errors: list[float] = []  # variances of the differences

    def learn(self, before: IntArray, after: IntArray, difference: float, stderr: float) -> None:
        """Add a measured difference: the loss of ``after`` minus that of ``before``, nats per token, finite."""
        feature = np.zeros_like(self._mean)
        rows = np.arange(len(before))
        feature[rows, after] += 1.0
        feature[rows, before] -= 1.0
        self._features.append(feature.ravel())
        self._differences.append(difference)
        self._errors.append(stderr**2)

    @property
    def sd(self) -> float:
        """Standard deviation of the prior, estimated from the residuals of the measured differences. The initial value
        counts as ``WEIGHT`` measurements."""
        if not self._differences:
            return self._sd
        features, differences = np.stack(self._features), np.array(self._differences)
        squares = (differences - features @ self._mean.ravel()) ** 2  # (measurements,)
        variances = np.maximum(squares - np.array(self._errors), 0.0) / (features**2).sum(axis=1)
        return float(np.sqrt((WEIGHT * self._sd**2 + variances.sum()) / (WEIGHT + len(differences))))

    def draw(self, rng: np.random.Generator) -> FloatArray:
        """Costs (n, m) drawn from the posterior: a draw from the prior, corrected by its residuals (Matheron)."""
        sd = self.sd
        costs = self._mean + sd * rng.normal(size=self._mean.shape)
        if not self._differences:
            return costs
        features = np.stack(self._features)  # (measurements, n m)
        # The model is linear, so interactions are noise: a tenth of the standard deviation for each moved layer.
        errors = np.array(self._errors) + (0.1 * sd) ** 2 * np.abs(features).sum(axis=1) / 2
        gram = sd**2 * features @ features.T + np.diag(errors)
        noise = np.sqrt(errors) * rng.normal(size=len(errors))
        residuals = np.array(self._differences) - features @ costs.ravel() - noise
        correction = sd**2 * features.T @ np.linalg.solve(gram, residuals)
        result: FloatArray = costs + correction.reshape(costs.shape)
        return result


def improve(space: SearchSpace, costs: FloatArray, pick: IntArray, budget: int, moves: int,
            limits: Sequence[Cost] = ()) -> IntArray:
    """Change at most ``moves`` layers of a pick within a budget and limits, each time by the single or double change
    that lowers the cost the most. Changes are numbered ``layer * m + choice``."""
    n, m = space.nbytes.shape
    rows = np.arange(n)
    start, pick = pick, pick.copy()
    while (remaining := moves - int((pick != start).sum())) > 0:
        added = (costs - costs[rows, pick][:, None]).ravel()  # (n m,) cost and bytes that each change adds
        size = (space.nbytes - space.nbytes[rows, pick][:, None]).ravel()
        added = np.where(np.repeat((pick != start), m), np.inf, added)  # a layer changes once
        room = budget - space.bytes_of(pick)
        alone = np.where((size > room) | ~np.broadcast_to(within(limits, pick), (n, m)).ravel(), np.inf, added)
        single = int(alone.argmin())
        best, changes = alone[single], [single]
        if remaining > 1 and limits:
            double = added[:, None] + added[None, :]
            double[np.repeat(rows, m)[:, None] == np.repeat(rows, m)] = np.inf
            double[size[:, None] + size > room] = np.inf
            for cost in limits:
                grown = cost.grown(pick).ravel()
                double[grown[:, None] + grown > cost.room(pick)] = np.inf
            if double.min() < best:
                best, changes = double.min(), list(divmod(int(double.argmin()), n * m))
        elif remaining > 1:
            # The best partner of each change is the cheapest change that is no larger than the room it leaves.
            order = np.argsort(size, kind="stable")
            cheapest = np.minimum.accumulate(added[order])  # (n m,) over the changes up to each size
            partner = np.searchsorted(size[order], room - size, side="right") - 1
            double = np.where(partner >= 0, added + cheapest[np.maximum(partner, 0)], np.inf)
            first = int(double.argmin())
            if double[first] < best:
                partners = np.where(size <= room - size[first], added, np.inf)
                partners[first // m * m:(first // m + 1) * m] = np.inf  # not the same layer twice
                second = int(partners.argmin())
                if added[first] + partners[second] < best:
                    best, changes = added[first] + partners[second], [first, second]
        if not best < 0:
            break
        for change in changes:
            pick[change // m] = change % m
    return pick
