"""Gradients for every layer, and measured moves of the layers that the plan is undecided about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Game, Player
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.statistics import standard_error
from impq_core.types import SensitivityEstimate
from impq_scores.gradients import AumannShapley, AumannShapleyOptions

_ROUNDING = 1e-12
"""Least variance of a move, relative to the mean square of the measured moves."""


@dataclass(frozen=True)
class Options:
    """Options of the coarse-to-fine estimator.

    Args:
        nodes: of the gradients on each width step, as for aumann-shapley.
        share: share of the layers that are moved and measured in each round.
        rounds: how often the plan is made anew and its undecided layers are measured.
    """

    nodes: int = 1
    share: float = 0.25
    rounds: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 8 or self.rounds < 1:
            raise ValueError("nodes must be 1 to 8, rounds at least 1")
        if not 0 < self.share <= 1:
            raise ValueError("share must be above 0 and at most 1")


class CoarseToFine(Player):
    """Aumann-Shapley values of all layers first. Then, at the budget, the layers that would change their width for the
    least are moved by a width up and down from the plan, and each move's loss is measured with the other layers at the
    plan's widths.

    The cost of a move is the mean of the scaled gradients' value and the measured one, each weighted by its precision:
    windows give the error of a measured difference, and the misses of the gradients give theirs.

    Cost: about 3 forwards a node and width step; for each move measured, half of the blocks and the head.
    """

    Options = Options

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
            at_plan = _finite(game.window_losses(pick), "of the plan so far")
            layers = undecided(space, costs, pick, price, moves.layers)[:count]
            for layer in sorted(layers, reverse=True):  # from the last: each pick shares its prefix with the plan
                for choice in (pick[layer] - 1, pick[layer] + 1):
                    if 0 <= choice < m:
                        moved = pick.copy()
                        moved[layer] = choice
                        where = f"with {space.layers[layer].name} at {space.choices[choice]} bits"
                        moves.add(layer, pick[layer], choice, _finite(game.window_losses(moved), where) - at_plan)
            costs = moves.combine(coarse)
        return SensitivityEstimate(space, costs, forwards=game.forwards,
                                   method=f"coarse-to-fine({len(moves.layers)} of {n} layers measured)")


def _finite(losses: FloatArray, where: str) -> FloatArray:
    if not np.isfinite(losses).all():
        raise ImpqError(f"the loss {where} is not finite: try --dtype float32 or wider --bits")
    return losses


class Moves:
    """Measured moves of single layers by one width, to be combined with a coarse estimate."""

    def __init__(self) -> None:
        self._moves: list[tuple[int, int]] = []
        self._means: list[float] = []
        self._errors: list[float] = []

    @property
    def layers(self) -> set[int]:
        """Layers moved so far."""
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
        """Costs (n, m), nats per token: the coarse ones (n, m) to scale, corrected where moves were measured."""
        layers, steps = np.array(self._moves).T
        measured, errors = np.array(self._means), np.array(self._errors)
        predicted = coarse[layers, steps + 1] - coarse[layers, steps]
        least = _ROUNDING * float((measured**2).mean()) or 1.0  # all moves cost nothing: any precision will do
        weights = 1.0 / (errors + max(float(np.median(errors)), least))
        square = float((weights * predicted**2).sum())
        scale = float((weights * measured * predicted).sum()) / square if square else 1.0
        scale = scale if scale > 0 else 1.0
        doubt = max(float(np.mean((measured - scale * predicted) ** 2 - errors)), least)
        table = np.diff(scale * coarse, axis=1)
        precision, total = np.full(table.shape, 1.0 / doubt), table / doubt
        np.add.at(precision, (layers, steps), 1.0 / (errors + least))
        np.add.at(total, (layers, steps), measured / (errors + least))
        table[layers, steps] = (total / precision)[layers, steps]
        return np.concatenate([np.zeros((len(coarse), 1)), table.cumsum(axis=1)], axis=1)


def cheapest(space: SearchSpace, costs: FloatArray, budget: int) -> tuple[IntArray, float]:
    """The pick (n,) of least cost at the least price of a byte at which the pick fits the budget, and that price.

    Args:
        space: the space.
        costs: (n, m), in nats per token or any other unit.
        budget: bytes, pinned layers included.

    Raises:
        ImpqError: the budget is below the smallest plan.
    """
    space.check_budget(budget)
    wide, narrow = np.triu_indices(costs.shape[1], 1)
    saved = space.nbytes[:, wide] - space.nbytes[:, narrow]
    # Prices at which a layer goes from one choice to another: between two of them the pick does not change.
    turns = ((costs[:, narrow] - costs[:, wide]) / np.maximum(saved, 1))[saved > 0]
    prices = np.unique(np.maximum([0.0, *turns], 0.0))
    inside = np.append((prices[:-1] + prices[1:]) / 2, 2 * prices[-1] or 1.0)

    def at(number: int) -> IntArray:
        pick: IntArray = (costs + inside[number] * (space.nbytes - space.nbytes[:, -1:])).argmin(axis=1)
        return pick

    low, high = -1, len(inside) - 1  # sizes fall with the price, and the last one is the smallest plan's
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if space.bytes_of(at(middle)) <= budget else (middle, high)
    return at(high), float(prices[high])


def undecided(space: SearchSpace, costs: FloatArray, pick: IntArray, price: float, measured: set[int]) -> list[int]:
    """Layers not measured yet, first those whose next-best choice is nearest to the pick's, relative to the span of the
    layer's own costs, which the error of a coarse estimate is proportional to."""
    priced = costs + price * space.nbytes
    own = np.arange(len(pick))
    margins = priced - priced[own, pick][:, None]
    margins[own, pick] = np.inf
    span = np.ptp(costs, axis=1)
    relative = np.divide(margins.min(axis=1), span, out=np.full(len(pick), np.inf), where=span > 0)
    return [int(layer) for layer in np.argsort(relative, kind="stable") if layer not in measured]
