"""Exchanges of widths proposed by a belief about every layer's cost, which each measurement corrects."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from impq_core.interfaces import Game, Refiner
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.types import Plan, SensitivityEstimate
from impq_refine.judge import Incumbent

PATIENCE = 200
"""Draws in a row without a new pick before the search ends."""

UNKNOWN = 0.1
"""Loss from all-widest to all-narrowest if no estimate gives a scale, nats per token."""

WEIGHT = 3.0
"""Measurements that the belief's first standard deviation counts as."""


@dataclass(frozen=True)
class Options:
    """Options of the swaps.

    Args:
        moves: most layers that one proposal changes.
        doubt: standard deviation of the belief's costs at the start, relative to the spread of the estimate's.
    """

    moves: int = 6
    doubt: float = 0.5

    def __post_init__(self) -> None:
        if self.moves < 2 or self.doubt <= 0:
            raise ValueError("moves must be at least 2, doubt must be positive")


class Swaps(Refiner):
    """Thompson sampling over exchanges.

    The belief about a layer's cost at each width, near the plan, is normal around the estimate. A draw from the belief
    proposes the best few changes that fit the budget; their measured joint difference, with its error over windows,
    corrects the belief (Bayesian linear regression). A pick that wins in the game goes before the referee. A loss that
    is not finite corrects nothing: the pick is not proposed again, and the search goes on.
    """

    Options = Options

    def refine(self, plan: Plan, estimate: SensitivityEstimate | None, game: Game, referee: Game, forwards: float,
               rng: np.random.Generator) -> Plan:
        """A plan within the budget, no worse on the referee's windows."""
        space = plan.space
        incumbent = Incumbent(plan.pick, game, referee, forwards)
        belief = Belief(local_costs(space, estimate, plan.pick), self.options.doubt)
        idle = 0
        while incumbent.may_go_on and idle < PATIENCE:
            pick = improve(space, belief.draw(rng), incumbent.pick, plan.budget_bytes,
                           int(rng.integers(2, self.options.moves + 1)))
            if pick.tobytes() in incumbent.seen:
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
    """(n, m): cost of each choice of each layer with the others at the pick, nats per token; without an estimate, in
    proportion to the squared error of rounding, and 0.1 from all-widest to all-narrowest."""
    n, m = space.nbytes.shape
    own = np.arange(n)
    if estimate is None:
        distortion = 4.0 ** -np.array([choice.bits for choice in space.choices])
        return np.tile(UNKNOWN / n * (distortion - distortion[0]) / (distortion[-1] - distortion[0]), (n, 1))
    moved = np.tile(pick, (n, m, 1))
    moved[own[:, None], np.arange(m), own[:, None]] = np.arange(m)
    return estimate.predict(moved.reshape(n * m, n)).reshape(n, m)


class Belief:
    """Normal belief about costs (n, m), corrected by measured differences.

    Args:
        costs: its mean.
        doubt: its standard deviation relative to the spread of the steps between neighbouring widths.
    """

    def __init__(self, costs: FloatArray, doubt: float) -> None:
        self._mean = costs
        steps = np.diff(costs, axis=1)
        spread = max(float(steps.std()), float(np.abs(steps).mean()))
        self._sd = doubt * (spread or UNKNOWN / steps.size)  # if all cost the same, the estimate gives no scale
        self._features: list[FloatArray] = []
        self._seen: list[float] = []
        self._errors: list[float] = []

    def learn(self, before: IntArray, after: IntArray, difference: float, stderr: float) -> None:
        """Correct the belief by a measured loss of ``after`` minus that of ``before``, nats per token, finite."""
        feature = np.zeros_like(self._mean)
        own = np.arange(len(before))
        feature[own, after] += 1.0
        feature[own, before] -= 1.0
        self._features.append(feature.ravel())
        self._seen.append(difference)
        self._errors.append(stderr**2)

    @property
    def sd(self) -> float:
        """Standard deviation of the first belief, updated by its misses: the one at the start counts as ``WEIGHT``
        measurements."""
        if not self._seen:
            return self._sd
        features, seen, errors = np.stack(self._features), np.array(self._seen), np.array(self._errors)
        missed = (seen - features @ self._mean.ravel()) ** 2
        variances = np.maximum(missed - errors, 0.0) / (features**2).sum(axis=1)
        return float(np.sqrt((WEIGHT * self._sd**2 + variances.sum()) / (WEIGHT + len(seen))))

    def draw(self, rng: np.random.Generator) -> FloatArray:
        """Costs (n, m) drawn from the corrected belief: a draw from the first one, moved by its misses."""
        sd = self.sd
        costs = self._mean + sd * rng.normal(size=self._mean.shape)
        if not self._seen:
            return costs
        features = np.stack(self._features)
        # Interactions of the layers moved are errors of a linear belief: a tenth of its deviation for each layer.
        errors = np.array(self._errors) + (0.1 * sd) ** 2 * np.abs(features).sum(axis=1) / 2
        gram = sd**2 * features @ features.T + np.diag(errors)
        missed = np.array(self._seen) - features @ costs.ravel() - np.sqrt(errors) * rng.normal(size=len(errors))
        moved = sd**2 * features.T @ np.linalg.solve(gram, missed)
        result: FloatArray = costs + moved.reshape(costs.shape)
        return result


def improve(space: SearchSpace, costs: FloatArray, pick: IntArray, budget: int, moves: int) -> IntArray:
    """Change at most ``moves`` layers of a pick, by the best single or double change in turn, within a budget."""
    n, m = space.nbytes.shape
    own = np.arange(n)
    start, pick = pick, pick.copy()
    while (left := moves - int((pick != start).sum())) > 0:
        gain = (costs - costs[own, pick][:, None]).ravel()
        size = (space.nbytes - space.nbytes[own, pick][:, None]).ravel()
        gain = np.where(np.repeat((pick != start), m), np.inf, gain)  # a layer is changed once
        room = budget - space.bytes_of(pick)
        one = int(np.where(size > room, np.inf, gain).argmin())
        best, chosen = (gain[one] if size[one] <= room else np.inf), [one]
        if left > 1:
            # The best partner of each change: for every size, the cheapest change that is no larger.
            order = np.argsort(size, kind="stable")
            cheapest = np.minimum.accumulate(gain[order])
            where = np.searchsorted(size[order], room - size, side="right") - 1
            both = np.where(where >= 0, gain + cheapest[np.maximum(where, 0)], np.inf)
            first = int(both.argmin())
            if both[first] < best:
                fits = np.where(size <= room - size[first], gain, np.inf)
                fits[first // m * m:(first // m + 1) * m] = np.inf
                second = int(fits.argmin())
                if gain[first] + fits[second] < best:
                    best, chosen = gain[first] + fits[second], [first, second]
        if not best < 0:
            break
        for move in chosen:
            pick[move // m] = move % m
    return pick
