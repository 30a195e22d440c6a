"""Demote layers one at a time in random orders and measure the loss after each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from impq_core.errors import UsageError
from impq_core.interfaces import Drift, Game, Sampler, unknown_drift
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.types import Measurements


@dataclass(frozen=True)
class Options:
    """Options of SPQE.

    Args:
        permutations: at most this many random orders (the paper: 100, with 50 as good; on a small model 4 made as good
            a plan as 25).
        antithetic: play each order also backwards, which counts as one of the permutations; false is the paper.
        tolerance: stop early once the mean standard error of the Shapley values is below this share of their spread
            (standard deviation over layers); 0 never stops early.
        settle: stop early once the plan has stopped changing: twice in a row the plan before an independent draw was
            less than this worse, in nats per token, than the one after it, by the estimate after it; 0 never does.
        fresh: play every order on calibration windows of its own, as long as there are any: nearly the same forwards
            see more text, and plans are better; false is the paper.
        truncate: end an order once the loss is this many nats above the reference, where the model has collapsed and
            further demotions tell nothing (SMPQ); 0 never does. Needs a surrogate that allows gaps, such as additive.
        around: nominal bits that plans are wanted for: of each order only the picks within ``span`` bits of it are
            measured, so that losses far from any plan cost nothing; 0 measures whole orders. Needs a surrogate that
            allows gaps, such as regression.
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
    (arXiv 2508.03002): an order is a shuffle in which every layer occurs once for each of its steps.

    Cost: n (m-1) evaluations a permutation, about half a forward each because prefixes are shared.
    """

    Options = Options

    def sample(self, game: Game, rng: np.random.Generator, drift: Drift = unknown_drift) -> Measurements:
        """Play up to ``permutations`` orders; losses are on disk after each."""
        space, options = game.space, self.options
        share = min(1.0, 2 * options.span / (space.choices[0].bits - space.choices[-1].bits)) if options.around else 1.0
        game.expect(1 + round(options.permutations * share * len(space) * (len(space.choices) - 1)))
        picks: list[IntArray] = []
        losses: list[FloatArray] = []
        replicates: list[int] = []
        calm = 0
        for number, (order, replicate) in enumerate(self._orders(space, rng)):
            if options.fresh:
                game.redraw(number)
            path = self._wanted(space, demotions(space, order))
            measured = self._play(game, path)
            picks.append(path[:len(measured)])
            losses.append(measured)
            replicates.append(replicate)
            if options.antithetic and len(replicates) % 2:
                continue
            if options.tolerance and self._tell(_gather(game, picks, losses, replicates)):
                break
            if options.settle:
                calm = calm + 1 if drift(_gather(game, picks, losses, replicates)) < options.settle else 0
                if calm == 2:
                    break
        if options.fresh:
            game.redraw(0)
        return _gather(game, picks, losses, replicates)

    def check_space(self, space: SearchSpace) -> None:
        """``around`` must lie within the menu."""
        if self.options.around and not space.choices[-1].bits <= self.options.around <= space.choices[0].bits:
            raise UsageError(f"estimator spqe: around={self.options.around:g} lies outside the menu, "
                             f"{space.choices[-1]} to {space.choices[0]} bits")

    def _wanted(self, space: SearchSpace, path: IntArray) -> IntArray:
        """The part of a path whose sizes are near the one asked for; at least a step of it."""
        if not self.options.around:
            return path
        away = np.abs([space.nominal_bits(space.bytes_of(pick)) - self.options.around for pick in path])
        nearest = int(away.argmin())
        inside = away <= self.options.span
        inside[max(0, min(nearest, len(path) - 2)):][:2] = True
        return path[inside]

    def _play(self, game: Game, path: IntArray) -> FloatArray:
        """Losses along a path, up to and with the first that is past the collapse."""
        if not self.options.truncate:
            return game.losses(path)
        measured: list[float] = []
        for pick in path:
            measured.append(game.loss(pick))
            if measured[-1] > self.options.truncate:
                break
        return np.array(measured)

    def _orders(self, space: SearchSpace, rng: np.random.Generator) -> Iterator[tuple[IntArray, int]]:
        """Orders of demotion, each with the number of its independent draw."""
        tickets = np.repeat(np.arange(len(space)), len(space.choices) - 1)
        replicates = self.options.permutations // (2 if self.options.antithetic else 1)
        for replicate in range(replicates):
            order = rng.permutation(tickets)
            yield order, replicate
            if self.options.antithetic:
                yield order[::-1], replicate

    def _tell(self, measurements: Measurements) -> bool:
        """Whether the Shapley values are known well enough to be told apart."""
        values, replicates = measurements.marginals()
        draws = np.stack([values[replicates == r].mean(axis=0) for r in np.unique(replicates)])
        if len(draws) < 3 or np.isnan(draws).any():
            return False  # a standard error of two draws, or of steps not reached, is no ground to stop on
        stderr = draws.std(axis=0, ddof=1).mean() / np.sqrt(len(draws))
        return bool(stderr <= self.options.tolerance * draws.mean(axis=0).std())


def demotions(space: SearchSpace, order: IntArray) -> IntArray:
    """The picks (len(order) + 1, n) from all-high, demoting the layers of ``order`` one step each in turn."""
    path = np.zeros((len(order) + 1, len(space)), dtype=np.int64)
    for step, layer in enumerate(order, start=1):
        path[step] = path[step - 1]
        path[step, layer] += 1
    return path


def _gather(game: Game, picks: list[IntArray], losses: list[FloatArray], replicates: list[int]) -> Measurements:
    lengths = [len(path) for path in picks]
    return Measurements(
        game.space, np.concatenate(picks), np.concatenate(losses),
        path=np.repeat(np.arange(len(picks)), lengths), step=np.concatenate([np.arange(n) for n in lengths]),
        replicate=np.repeat(replicates, lengths), tokens=game.tokens, reference_loss=game.reference_loss,
        forwards=game.forwards, budget_bytes=game.budget_bytes)
