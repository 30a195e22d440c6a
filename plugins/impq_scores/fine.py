"""Gradients for every layer, measured moves where the plan is undecided."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Estimator, Game
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.types import SensitivityEstimate
from impq_scores.gradients import AumannShapley, AumannShapleyOptions


@dataclass(frozen=True)
class Options:
    """Options of the coarse-to-fine estimator.

    Args:
        nodes: of the gradients on each width step, as for aumann-shapley.
        share: share of the layers that moves are measured of, in each round.
        rounds: how often the plan is made anew and its undecided layers measured.
    """

    nodes: int = 1
    share: float = 0.25
    rounds: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 8 or self.rounds < 1:
            raise ValueError("nodes must be 1 to 8, rounds at least 1")
        if not 0 < self.share <= 1:
            raise ValueError("share must be above 0 and at most 1")


class CoarseToFine(Estimator):
    """Aumann-Shapley values of all layers first; then, at the budget, the layers that would change their width for the
    least are moved by a width up and down from the plan, and the loss is measured there, among neighbours that stand
    where they will.

    What is believed of a move is the mean of what the gradients said, to scale, and what was measured, each weighted by
    its precision: windows tell the error of a measured difference, and the misses of the gradients tell theirs.

    Cost: about 3 forwards a node and width step; for each move measured, half of the blocks and the head.
    """

    Options = Options

    def estimate(self, game: Game, rng: np.random.Generator) -> SensitivityEstimate:
        """The additive estimate, exact where it matters for the game's budget (the middle of the menu where there is
        none); raises ImpqError where a loss is not finite."""
        space, options = game.space, self.options
        n, m = space.nbytes.shape
        budget = game.budget_bytes if game.budget_bytes is not None else (space.low_bytes + space.high_bytes) // 2
        coarse = AumannShapley(AumannShapleyOptions(options.nodes)).inspect(game.probe, rng).linear
        told = Moves()
        costs = coarse
        count = max(1, round(options.share * n))
        game.expect(round(1 + options.rounds * count * min(2, m - 1)))
        for _ in range(options.rounds):
            pick, price = cheapest(space, costs, budget)
            at_plan = game.window_losses(pick)
            layers = undecided(space, costs, pick, price, told.layers)[:count]
            for layer in sorted(layers, reverse=True):  # each prefix is the plan's
                for choice in (pick[layer] - 1, pick[layer] + 1):
                    if 0 <= choice < m:
                        moved = pick.copy()
                        moved[layer] = choice
                        told.add(layer, pick[layer], choice, game.window_losses(moved) - at_plan)
            costs = told.believe(coarse)
        return SensitivityEstimate(space, costs, forwards=game.forwards,
                                   method=f"coarse-to-fine({len(told.layers)} of {n} layers measured)")


class Moves:
    """Measured moves of single layers, and what they say together with a coarse estimate."""

    def __init__(self) -> None:
        self._moves: list[tuple[int, int, int]] = []
        self._means: list[float] = []
        self._errors: list[float] = []

    @property
    def layers(self) -> set[int]:
        """Those moved so far."""
        return {layer for layer, *_ in self._moves}

    def add(self, layer: int, before: int, after: int, differences: FloatArray) -> None:
        """A layer's move changed the loss by so much on each window, nats per token."""
        if not np.isfinite(differences).all():
            raise ImpqError("the loss of a move is not finite: try --dtype float32 or wider --bits")
        self._moves.append((layer, min(before, after), max(before, after)))
        sign = 1.0 if after > before else -1.0
        self._means.append(sign * float(differences.mean()))
        count = len(differences)
        self._errors.append(float(differences.var(ddof=1) / count) if count > 1 else 0.0)

    def believe(self, coarse: FloatArray) -> FloatArray:
        """Costs (n, m), nats per token: the coarse ones to scale, corrected where moves were measured."""
        layers, before, after = np.array(self._moves).T
        seen, errors = np.array(self._means), np.array(self._errors)
        said = coarse[layers, after] - coarse[layers, before]
        weights = 1.0 / (errors + max(float(np.median(errors)), 1e-12))
        scale = max(float((weights * seen * said).sum() / max((weights * said**2).sum(), 1e-30)), 0.0) or 1.0
        doubt = max(float(np.mean((seen - scale * said) ** 2 - errors)), 1e-12)
        steps = np.diff(scale * coarse, axis=1)
        belief: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for layer, step, mean, error in zip(layers, before, seen, errors, strict=True):
            belief.setdefault((int(layer), int(step)), []).append((float(mean), float(error)))
        for (layer, step), found in belief.items():
            precisions = [1.0 / (error + 1e-12) for _, error in found]
            total = sum(p * mean for p, (mean, _) in zip(precisions, found, strict=True)) + steps[layer, step] / doubt
            steps[layer, step] = total / (sum(precisions) + 1.0 / doubt)
        return np.concatenate([np.zeros((len(coarse), 1)), steps.cumsum(axis=1)], axis=1)


def cheapest(space: SearchSpace, costs: FloatArray, budget: int) -> tuple[IntArray, float]:
    """The pick (n,) of least cost at the least price of a byte (nats) at which the pick fits the budget."""
    def at(price: float) -> IntArray:
        pick: IntArray = (costs + price * space.nbytes).argmin(axis=1)
        return pick

    low, high = 0.0, 1e-12
    while space.bytes_of(at(high)) > budget:
        high *= 4.0
        if high > 1e6:
            raise ImpqError(f"a budget of {budget} bytes is below the smallest plan")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if space.bytes_of(at(middle)) <= budget else (middle, high)
    return at(high), high


def undecided(space: SearchSpace, costs: FloatArray, pick: IntArray, price: float, known: set[int]) -> list[int]:
    """Layers not known yet, those first whose next-best choice is nearest to the pick's: in shares of what the layer's
    own costs span, which is what a coarse estimate errs by."""
    priced = costs + price * space.nbytes
    own = np.arange(len(pick))
    margins = priced - priced[own, pick][:, None]
    margins[own, pick] = np.inf
    relative = margins.min(axis=1) / np.maximum(np.ptp(costs, axis=1), 1e-12)
    return [int(layer) for layer in np.argsort(relative, kind="stable") if layer not in known]
