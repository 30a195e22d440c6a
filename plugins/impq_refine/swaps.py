"""Exchanges of widths proposed by a belief about every layer's cost, which each measurement corrects."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from impq_core.interfaces import Game, Refiner
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.types import Plan, SensitivityEstimate
from impq_refine.judge import Incumbent, mean_and_stderr

PATIENCE = 200
"""Draws in a row that propose nothing new before the search ends."""

WEIGHT = 3.0
"""Measurements that the first doubt counts as much as."""


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

    What a layer costs at each width, near the plan, is believed to be normal around the estimate. A draw from the
    belief proposes the best few changes that fit the budget; their measured joint difference, with its error over
    windows, corrects the belief (Bayesian linear regression); what won in the game goes before the referee.
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
            mean, stderr = mean_and_stderr(incumbent.measure(pick))
            belief.learn(incumbent.pick, pick, mean, stderr)
            if mean < 0:
                incumbent.challenge(pick)
        predicted = float(estimate.predict(incumbent.pick)[0]) if estimate else None
        return replace(plan, pick=incumbent.pick, predicted_loss=predicted, bound=None,
                       method=f"{plan.method} + swaps({incumbent.taken} taken)")


def local_costs(space: SearchSpace, estimate: SensitivityEstimate | None, pick: IntArray) -> FloatArray:
    """(n, m): what each choice of each layer costs while the others stand at the pick, nats per token; where nothing
    is known, in proportion to the squared error of rounding, and 0.1 in all."""
    n, m = space.nbytes.shape
    own = np.arange(n)
    if estimate is None:
        distortion = 4.0 ** -np.array([choice.bits for choice in space.choices])
        return np.tile(0.1 / n * (distortion - distortion[0]) / (distortion[-1] - distortion[0]), (n, 1))
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
        self._sd = doubt * max(float(np.diff(costs, axis=1).std()), float(np.abs(np.diff(costs, axis=1)).mean()), 1e-6)
        self._features: list[FloatArray] = []
        self._seen: list[float] = []
        self._errors: list[float] = []

    def learn(self, before: IntArray, after: IntArray, difference: float, stderr: float) -> None:
        """A pick's loss minus another's was measured; how the layers moved meet each other counts as error too."""
        feature = np.zeros_like(self._mean)
        own = np.arange(len(before))
        feature[own, after] += 1.0
        feature[own, before] -= 1.0
        self._features.append(feature.ravel())
        self._seen.append(difference)
        self._errors.append(stderr**2)

    @property
    def sd(self) -> float:
        """Standard deviation of the first belief, in the light of how far it was from what was measured: what is
        doubted at the start counts as much as ``WEIGHT`` measurements."""
        if not self._seen:
            return self._sd
        features, seen, errors = np.stack(self._features), np.array(self._seen), np.array(self._errors)
        missed = (seen - features @ self._mean.ravel()) ** 2
        variances = np.maximum(missed - errors, 0.0) / (features**2).sum(axis=1)
        return float(np.sqrt((WEIGHT * self._sd**2 + variances.sum()) / (WEIGHT + len(seen))))

    def draw(self, rng: np.random.Generator) -> FloatArray:
        """Costs (n, m) from the belief as it stands: a draw from the first belief, moved by what contradicts it."""
        sd = self.sd
        costs = self._mean + sd * rng.normal(size=self._mean.shape)
        if not self._seen:
            return costs
        features = np.stack(self._features)
        # How the layers moved meet each other is error too: a tenth of the doubt for each of them.
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
