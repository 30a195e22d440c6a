"""The SPQE sampler: demotes layers one at a time in random orders and measures the loss after each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from impq_core.errors import UsageError
from impq_core.interfaces import Drift, Game, Sampler, unknown_drift
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.statistics import standard_error
from impq_core.types import Measurements
from impq_core.workload import Workload, losses_by_block

DRAWS = 16
"""Random orders that the number of losses near a width is forecast from."""


@dataclass(frozen=True)
class Options:
    """Options of SPQE.

    Args:
        permutations: largest number of random orders (the paper: 100, with 50 as good; on a small model 4 gave as good
            a plan as 25).
        antithetic: play each order also in reverse, which counts as a permutation; the paper does not (false).
        tolerance: stop if the mean standard error of the Shapley values is below this share of their standard
            deviation over layers; it takes at least three independent draws. 0 never stops early.
        settle: stop if the plan is stable, for two independent draws in a row: by the estimate after the draw, the
            plan before it is less than this many nats per token worse than the plan after it. 0 never stops early.
        fresh: play every pair of orders (every order if not antithetic) on its own calibration windows; if there are
            more draws than sets of windows, the sets repeat. The same forwards read more text, and plans are better;
            the paper does not (false).
            Interactions are only visible between orders on the same windows: with antithetic=false every order has its
            own, so the covariance surrogate is refused and the certificate of ``impq fit`` is unknown.
        truncate: end an order if the loss is this many nats per token above the reference: the model has collapsed, and
            further demotions are not informative (SMPQ); 0 never does. Needs a surrogate that allows gaps, such as
            additive.
        around: nominal bits near which plans are wanted: of each order only the picks within ``span`` bits of it are
            measured; 0 measures whole orders. Needs a surrogate that allows gaps, such as regression.
        span: nominal bits on either side of ``around``.
    """

    permutations: int = 4
    antithetic: bool = True
    tolerance: float = 0.0
    settle: float = 0.0
    fresh: bool = True
    truncate: float = 0.0
    around: float = 0.0
    span: float = 0.25

    def __post_init__(self) -> None:
        if self.permutations < 1:
            raise ValueError("permutations must be at least 1")
        if self.antithetic and self.permutations % 2:
            raise ValueError("permutations must be even with antithetic pairs (or say antithetic=false)")
        if min(self.tolerance, self.settle, self.truncate) < 0:
            raise ValueError("tolerance, settle and truncate must not be negative")
        if self.around < 0 or self.span <= 0:
            raise ValueError("around must not be negative, span must be positive")


class Spqe(Sampler):
    """Progressive demotion (IMPQ section 3, SPQE): every path starts with all layers at the widest choice and demotes
    one layer by one step until all are at the narrowest, in random order; the loss is measured after every step.

    With two widths this is the paper's game. With more, the players are (layer, width step) pairs, as in SMPQ
    (arXiv 2508.03002): an order is a shuffle in which every layer occurs m - 1 times.

    Cost: n (m-1) evaluations for each permutation. An evaluation costs about half of the blocks, because prefixes are
    shared, and the head: 0.62 forwards on a model whose head is a fifth of a forward.
    """

    Options = Options

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """The losses of all orders if none ends early, and the reference on each set of windows.

        An order that begins at an end which was measured on its windows (the reference, or all-narrowest after an
        earlier order) shares blocks with it; the first loss of any other order shares none. Ends are measured once.
        """
        options, narrowest = self.options, space.uniform(len(space.choices) - 1)
        draws = options.permutations // 2 if options.antithetic else options.permutations
        first = min(draws, sets) if options.fresh else 1  # orders that are the first on their windows
        later = options.permutations - first
        paths = [self._near(space, demotions(space, order)) for order in self._draws(space, np.random.default_rng(0))]
        picks = float(np.mean([len(path) for path in paths]))
        begins, ends = bool((paths[0][0] == 0).all()), bool((paths[0][-1] == narrowest).all())
        measured = first * (picks - begins) + later * (picks - begins - ends)
        whole = first * (not begins) + later * (not ends)
        moves = (measured - whole) / len(space)
        return Workload(losses_by_block(space, [moves] * len(space), first + whole), sets=first)

    def _draws(self, space: SearchSpace, rng: np.random.Generator) -> list[IntArray]:
        """Random orders that the mean length of a measured path is taken over; one, if orders are measured whole."""
        tickets = np.repeat(np.arange(len(space)), len(space.choices) - 1)
        return [rng.permutation(tickets) for _ in range(DRAWS if self.options.around else 1)]

    def sample(self, game: Game, rng: np.random.Generator, drift: Drift = unknown_drift) -> Measurements:
        """Play up to ``permutations`` orders; losses are on disk after each."""
        space, options = game.space, self.options
        ahead = [(self._near(space, demotions(space, order)), replicate)
                 for order, replicate in self._orders(space, rng)]
        early = options.tolerance or options.settle or options.truncate
        game.expect(round(float(self.workload(space, options.permutations).losses.sum())), wanted=() if early else [
            (replicate if options.fresh else 0, path) for path, replicate in ahead])
        orders: list[_Played] = []
        windows = drawn = stable = 0  # number of the set, replicate that plays on it, draws in a row with a stable plan
        for path, replicate in ahead:
            if options.fresh and replicate != drawn:
                windows, drawn = game.redraw(replicate), replicate
            losses = self._play(game, path)
            orders.append(_Played(path[:len(losses)], losses, replicate, windows))
            if options.antithetic and len(orders) % 2:
                continue
            if options.tolerance and self._precise(_gather(game, orders)):
                break
            if options.settle:
                stable = stable + 1 if drift(_gather(game, orders)) < options.settle else 0
                if stable == 2:
                    break
        if windows:
            game.redraw(0)
        return _gather(game, orders)

    def check_space(self, space: SearchSpace) -> None:
        """Raises UsageError if ``around`` lies outside the menu."""
        if self.options.around and not space.ends[0] <= self.options.around <= space.ends[1]:
            raise UsageError(f"estimator spqe: around={self.options.around:g} lies outside the menu, "
                             f"{space.choices[-1]} to {space.choices[0]} bits")

    def _near(self, space: SearchSpace, path: IntArray) -> IntArray:
        """The picks of a path within ``span`` of ``around``; at least two neighbours."""
        if not self.options.around:
            return path
        distances = np.abs([space.nominal_bits(space.bytes_of(pick)) - self.options.around for pick in path])
        nearest = int(distances.argmin())
        inside = distances <= self.options.span
        inside[max(0, min(nearest, len(path) - 2)):][:2] = True
        return path[inside]

    def _play(self, game: Game, path: IntArray) -> FloatArray:
        """Losses along a path; with ``truncate`` it ends at the first above it (included) or not finite (left out)."""
        if not self.options.truncate:
            return game.losses(path)
        losses: list[float] = []
        for pick in path:
            loss = game.loss(pick)
            if np.isfinite(loss):
                losses.append(loss)
            if not loss <= self.options.truncate:
                break
        return np.array(losses)

    def _orders(self, space: SearchSpace, rng: np.random.Generator) -> Iterator[tuple[IntArray, int]]:
        """Orders of demotion (n (m-1),), each with the number of its independent draw."""
        layer_repeated = np.repeat(np.arange(len(space)), len(space.choices) - 1)
        replicates = self.options.permutations // (2 if self.options.antithetic else 1)
        for replicate in range(replicates):
            order = rng.permutation(layer_repeated)
            yield order, replicate
            if self.options.antithetic:
                yield order[::-1], replicate

    def _precise(self, measurements: Measurements) -> bool:
        """Whether the standard errors of the Shapley values are below ``tolerance`` times their spread."""
        values, replicates = measurements.marginals()
        draws = np.stack([values[replicates == r].mean(axis=0) for r in np.unique(replicates)])  # (draws, n, m-1)
        if len(draws) < 3 or np.isnan(draws).any():
            return False  # the standard error of two draws is too rough; a step that was not reached has none
        stderr = np.apply_along_axis(standard_error, 0, draws).mean()
        return bool(stderr <= self.options.tolerance * draws.mean(axis=0).std())


def demotions(space: SearchSpace, order: IntArray) -> IntArray:
    """The picks (len(order) + 1, n) from all-widest, demoting the layers of ``order`` one step each in turn."""
    path = np.zeros((len(order) + 1, len(space)), dtype=np.int64)
    for step, layer in enumerate(order, start=1):
        path[step] = path[step - 1]
        path[step, layer] += 1
    return path


@dataclass(frozen=True, eq=False)
class _Played:
    """The measured part of an order: picks (K, n), losses (K,), number of the independent draw, set of windows."""

    picks: IntArray
    losses: FloatArray
    replicate: int
    windows: int


def _gather(game: Game, orders: Sequence[_Played]) -> Measurements:
    lengths = [len(order.losses) for order in orders]
    return Measurements(
        game.space, np.concatenate([order.picks for order in orders]), np.concatenate([o.losses for o in orders]),
        path=np.repeat(np.arange(len(orders)), lengths), step=np.concatenate([np.arange(n) for n in lengths]),
        replicate=np.repeat([order.replicate for order in orders], lengths), tokens=game.tokens,
        reference_loss=game.reference_loss, forwards=game.forwards, budget_bytes=game.budget_bytes,
        windows=np.repeat([order.windows for order in orders], lengths))
