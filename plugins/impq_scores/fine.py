"""Coarse-to-fine estimation: gradients for every layer, then measured losses for the undecided layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Game, GameEstimator
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.statistics import standard_error
from impq_core.types import SensitivityEstimate
from impq_core.workload import Workload, losses_by_block
from impq_scores.gradients import AumannShapley, AumannShapleyOptions

_ROUNDING = 1e-12
"""Least variance of a move, relative to the mean square of the measured moves."""


@dataclass(frozen=True)
class Options:
    """Options of the coarse-to-fine estimator.

    Args:
        nodes: Gauss-Legendre nodes on each width step, as for aumann-shapley.
        share: share of the layers that are measured in each round.
        rounds: number of rounds; each makes a plan from the costs so far and measures its undecided layers.
    """

    nodes: int = 1
    share: float = 0.25
    rounds: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 8 or self.rounds < 1:
            raise ValueError("nodes must be 1 to 8, rounds at least 1")
        if not 0 < self.share <= 1:
            raise ValueError("share must be above 0 and at most 1")


class CoarseToFine(GameEstimator):
    """Aumann-Shapley values of all layers, corrected by measured moves of the undecided layers near the budget.

    A layer is undecided if a small change of its costs would change its width in the plan. Each such layer is moved to
    the next wider and the next narrower width, the other layers stay at the plan's widths, and the change of the loss
    is measured.

    The cost of a move is the mean of the scaled Aumann-Shapley value and the measured change, weighted by precision:
    the variance of a measured change is taken over windows, that of the scaled values from their residuals.

    Cost: about 4 forwards a node and width step; for each measured move, half of the blocks and the head.
    """

    Options = Options

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """The slopes of aumann-shapley, the reference, and in each round the plan and the moves of the undecided
        layers, which are taken to lie anywhere in the model. A layer at an end of the menu has one move, any other
        layer two; the choices of the plan are taken to be equally frequent."""
        n, m = space.nbytes.shape
        rounds, count = self.options.rounds, max(1, round(self.options.share * n))
        measured = min(n, rounds * count)  # a layer is measured once
        moves = np.full(n, measured * 2 * (m - 1) / m / n)
        coarse = AumannShapley(AumannShapleyOptions(self.options.nodes)).workload(space, sets)
        return replace(coarse, losses=losses_by_block(space, moves, whole=1 + rounds), sets=1)

    def estimate(self, game: Game, rng: np.random.Generator) -> SensitivityEstimate:
        """The additive estimate, refined near the game's budget (the middle of the menu if it has none).

        Raises:
            ImpqError: a slope or a loss is not finite.
        """
        space, options = game.space, self.options
        n, m = space.nbytes.shape
        budget = game.budget_bytes if game.budget_bytes is not None else (space.low_bytes + space.high_bytes) // 2
        coarse = AumannShapley(AumannShapleyOptions(options.nodes)).inspect(game.probe, rng).linear
        moves = Moves()
        costs = coarse
        count = max(1, round(options.share * n))
        game.expect(round(1 + options.rounds * count * min(2, m - 1)))
        for _ in range(options.rounds):
            pick, price = cheapest(space, costs, budget)
            at_plan = _finite(game.window_losses(pick), "of the current plan")
            layers = undecided(space, costs, pick, price, moves.layers)[:count]
            for layer in sorted(layers, reverse=True):  # from the last: each pick shares its prefix with the plan
                for choice in (pick[layer] - 1, pick[layer] + 1):
                    if 0 <= choice < m:
                        moved = pick.copy()
                        moved[layer] = choice
                        setting = f"with {space.layers[layer].name} at {space.choices[choice]} bits"
                        differences = _finite(game.window_losses(moved), setting) - at_plan  # (windows,)
                        moves.add(layer, pick[layer], choice, differences)
            costs = moves.combine(coarse)
        return SensitivityEstimate(space, costs, forwards=game.forwards,
                                   method=f"coarse-to-fine({len(moves.layers)} of {n} layers measured)")


def _finite(losses: FloatArray, setting: str) -> FloatArray:
    if not np.isfinite(losses).all():
        raise ImpqError(f"the loss {setting} is not finite: try --dtype float32 or wider --bits")
    return losses


class Moves:
    """Measured moves of single layers by one width, to be combined with a coarse estimate."""

    def __init__(self) -> None:
        self._moves: list[tuple[int, int]] = []
        self._means: list[float] = []
        self._errors: list[float] = []

    @property
    def layers(self) -> set[int]:
        """Layers with at least one measured move."""
        return {layer for layer, _ in self._moves}

    def add(self, layer: int, before: int, after: int, differences: FloatArray) -> None:
        """Add a layer's move from one choice to a neighbour.

        Args:
            layer: its number.
            before: the choice in the plan.
            after: the neighbouring choice.
            differences: (windows,) change of the loss on each window, nats per token, finite.
        """
        self._moves.append((layer, min(before, after)))
        self._means.append(float(differences.mean()) * (1 if after > before else -1))
        self._errors.append(standard_error(differences) ** 2 if len(differences) > 1 else 0.0)

    def combine(self, coarse: FloatArray) -> FloatArray:
        """Costs (n, m), nats per token: the scaled coarse costs (n, m), corrected by the measured moves."""
        layers, steps = np.array(self._moves).T  # (moves,) each; step k leads from choice k to choice k + 1
        measured, errors = np.array(self._means), np.array(self._errors)  # (moves,) means and their variances
        predicted = coarse[layers, steps + 1] - coarse[layers, steps]
        least = _ROUNDING * float((measured**2).mean()) or 1.0  # if no move costs anything, any variance will do
        # Scale: weighted least squares of the measured moves on the predicted ones.
        weights = 1.0 / (errors + max(float(np.median(errors)), least))
        square = float((weights * predicted**2).sum())
        scale = float((weights * measured * predicted).sum()) / square if square else 1.0
        scale = scale if scale > 0 else 1.0
        coarse_variance = max(float(np.mean((measured - scale * predicted) ** 2 - errors)), least)
        # Mean of the coarse and the measured step costs, weighted by precision.
        step_costs = np.diff(scale * coarse, axis=1)  # (n, m-1)
        precision, total = np.full(step_costs.shape, 1.0 / coarse_variance), step_costs / coarse_variance
        np.add.at(precision, (layers, steps), 1.0 / (errors + least))
        np.add.at(total, (layers, steps), measured / (errors + least))
        step_costs[layers, steps] = (total / precision)[layers, steps]
        return np.concatenate([np.zeros((len(coarse), 1)), step_costs.cumsum(axis=1)], axis=1)


def cheapest(space: SearchSpace, costs: FloatArray, budget: int) -> tuple[IntArray, float]:
    """Allocate by Lagrangian relaxation: minimise cost plus price times bytes, at the least price that fits the budget.

    Args:
        space: the search space.
        costs: (n, m), in nats per token or any other unit.
        budget: bytes, pinned layers included.

    Returns:
        The pick (n,) and the price, in the unit of ``costs`` per byte.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    space.check_budget(budget)
    wide, narrow = np.triu_indices(costs.shape[1], 1)
    saved = space.nbytes[:, wide] - space.nbytes[:, narrow]  # (n, pairs of choices)
    # A layer changes its choice only at these prices; in an interval between two of them the pick is constant.
    breakpoints = ((costs[:, narrow] - costs[:, wide]) / np.maximum(saved, 1))[saved > 0]
    prices = np.unique(np.maximum([0.0, *breakpoints], 0.0))
    midpoints = np.append((prices[:-1] + prices[1:]) / 2, 2 * prices[-1] or 1.0)

    def pick_in(interval: int) -> IntArray:
        pick: IntArray = (costs + midpoints[interval] * (space.nbytes - space.nbytes[:, -1:])).argmin(axis=1)
        return pick

    low, high = -1, len(midpoints) - 1  # sizes fall as the price rises; the last interval gives the smallest plan
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if space.bytes_of(pick_in(middle)) <= budget else (middle, high)
    return pick_in(high), float(prices[high])


def undecided(space: SearchSpace, costs: FloatArray, pick: IntArray, price: float, measured: set[int]) -> list[int]:
    """Layers outside ``measured``, the most undecided first.

    A layer is ordered by its margin: the priced cost of its second-best choice minus that of its choice in the pick,
    relative to the range of the layer's costs (the error of a coarse estimate is proportional to that range).
    """
    priced = costs + price * space.nbytes  # (n, m)
    rows = np.arange(len(pick))
    margins = priced - priced[rows, pick][:, None]
    margins[rows, pick] = np.inf
    span = np.ptp(costs, axis=1)
    relative = np.divide(margins.min(axis=1), span, out=np.full(len(pick), np.inf), where=span > 0)
    return [int(layer) for layer in np.argsort(relative, kind="stable") if layer not in measured]
