"""GAMMA: shares of the widths of every layer, learned under the budget by gradients of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Game, GameEstimator
from impq_core.space import FloatArray, SearchSpace
from impq_core.types import SensitivityEstimate
from impq_core.workload import Workload

_LEAST = 1e-6
"""The least share of a choice, relative to the largest of its layer."""


@dataclass(frozen=True)
class Options:
    """Options of the gamma estimator.

    Args:
        steps: gradient steps.
        rate: size of a step: a choice whose cost is one standard deviation above its layer's mean has its share divided
            by exp(rate) in the first step.
    """

    steps: int = 8
    rate: float = 0.7

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rate <= 0:
            raise ValueError("steps must be at least 1, rate positive")


class Gamma(GameEstimator):
    """GAMMA (arXiv 2605.18475): preferences of every layer over the widths, learned by gradients of the loss while all
    layers move together, under the budget; then the program.

    The shares p (n, m) blend each layer's variants. Each step takes the slopes ``c_ik`` of the loss from the blend of
    layer i to its choice k, and moves by mirror descent, ``p_ik ~ p_ik exp(-rate c_ik)``. Then the shares are projected
    on the budget, in place of the paper's augmented Lagrangian: they meet it in each step. The paper reconstructs
    hidden states; here the loss is the game's.

    The learned log shares are, up to a price of bytes, the sum of the slopes over the steps, so the estimate is the
    mean slope on the way. The slopes at the end rank nothing: where the shares have settled, all choices in use cost
    the same.

    The budget is the game's, or the middle of the menu if it has none. Cost: about 4 forwards a step.
    """

    Options = Options

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """A reading of slopes for each step."""
        return Workload.inspection(space, slopes=self.options.steps)

    def estimate(self, game: Game, rng: np.random.Generator) -> SensitivityEstimate:
        """The additive estimate near the game's budget.

        Raises:
            ImpqError: a slope is not finite.
        """
        space, options = game.space, self.options
        nbytes = space.nbytes.astype(np.float64)
        whole = game.budget_bytes if game.budget_bytes is not None else (space.low_bytes + space.high_bytes) // 2
        budget = max(float(nbytes[:, -1].sum()), whole - float(space.fixed_bytes))
        shares = within_budget(np.full(nbytes.shape, 1.0 / nbytes.shape[1]), nbytes, budget)
        total, unit = np.zeros(nbytes.shape), 0.0
        for _ in range(options.steps):
            costs = game.probe.slopes(shares).mean(axis=0)  # (n, m)
            if not np.isfinite(costs).all():
                raise ImpqError("a slope of the loss is not finite: try --dtype float32 or wider --bits")
            total += costs
            centred = costs - (shares * costs).sum(axis=1, keepdims=True)
            unit = unit or float(np.sqrt((shares * centred**2).sum(axis=1).mean())) or 1.0
            logs = np.log(shares) - options.rate * centred / unit
            moved = np.maximum(np.exp(logs - logs.max(axis=1, keepdims=True)), _LEAST)
            shares = within_budget(moved / moved.sum(axis=1, keepdims=True), nbytes, budget)
        mean = total / options.steps
        return SensitivityEstimate(space, mean - mean[:, :1], method=f"gamma({options.steps} steps)",
                                   forwards=game.forwards, is_loss=False)


def within_budget(shares: FloatArray, nbytes: FloatArray, budget: float) -> FloatArray:
    """The nearest shares in the sense of Kullback and Leibler whose expected bytes are at most a budget:
    ``p_ik exp(-price bytes_ik)``, normalised, at the least price that fits.

    Args:
        shares: (n, m), positive, rows of sum 1.
        nbytes: (n, m).
        budget: bytes of all layers together, at least those of the narrowest.
    """
    size = float(nbytes.max())
    logs = np.log(shares)

    def at(price: float) -> FloatArray:
        moved = logs - price * nbytes / size
        moved = np.exp(moved - moved.max(axis=1, keepdims=True))
        found: FloatArray = moved / moved.sum(axis=1, keepdims=True)
        return found

    low, high = 0.0, 1.0
    if (at(low) * nbytes).sum() <= budget:
        return at(low)
    while (at(high) * nbytes).sum() > budget and high < 1e6:
        high *= 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (at(middle) * nbytes).sum() > budget else (low, middle)
    return at(high)
