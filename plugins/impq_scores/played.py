"""Estimators from the measured losses of single and double demotions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impq_core.config import width_name
from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import Game, GameEstimator
from impq_core.space import SearchSpace
from impq_core.types import SensitivityEstimate
from impq_core.workload import Workload, losses_by_block


@dataclass(frozen=True)
class IsolatedOptions:
    """Options of the isolated estimator.

    Args:
        base: width of the other layers, as --bits names it; the widest by default. A width near the budget measures
            each layer in the surroundings that it will have in the plan: a demotion costs more among narrow layers than
            among wide ones.
    """

    base: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", width_name(self.base))


class Isolated(GameEstimator):
    """Each layer at each other width, the others at the base: ``linear[i, k] = loss(i at k) - loss(i at the widest)``.

    Cost: n (m-1) evaluations, each of half of the blocks (on average) and the head.
    """

    Options = IsolatedOptions

    def check_space(self, space: SearchSpace) -> None:
        """The base must be on the menu."""
        names = [choice.name for choice in space.choices]
        if self.options.base and self.options.base not in names:
            raise UsageError(f"estimator isolated: base={self.options.base} is none of the widths of --bits "
                             f"({', '.join(names)})")

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """The reference, the base if it is another pick, and each layer at each other width."""
        n, m = space.nbytes.shape
        whole = 2 if self._base(space) else 1
        return Workload(losses_by_block(space, [m - 1] * n, whole), sets=1)

    def _base(self, space: SearchSpace) -> int:
        return next((k for k, choice in enumerate(space.choices) if choice.name == self.options.base), 0)

    def estimate(self, game: Game, rng: np.random.Generator) -> SensitivityEstimate:
        """The additive estimate; raises ImpqError if a loss is not finite."""
        space = game.space
        n, m = space.nbytes.shape
        picks = np.tile(space.uniform(self._base(space)), (n, m, 1))  # (n, m, n): the pick with layer i at choice k
        picks[np.arange(n)[:, None], np.arange(m), np.arange(n)[:, None]] = np.arange(m)
        game.expect(1 + n * (m - 1))
        # From the last layer to the first, so that each pick shares its prefix with the base.
        losses = game.losses(picks[::-1].reshape(n * m, n)).reshape(n, m)[::-1]
        if not np.isfinite(losses).all():
            layer = space.layers[int(np.argwhere(~np.isfinite(losses))[0, 0])].name
            raise ImpqError(f"the loss with {layer} moved is not finite: try --dtype float32 or wider --bits")
        method = f"isolated(base={self.options.base})" if self._base(space) else "isolated"
        return SensitivityEstimate(space, losses - losses[:, :1], method=method, forwards=game.forwards)


@dataclass(frozen=True)
class CladoOptions:
    """Options of CLADO.

    Args:
        pairs: ``all`` measures every pair of layers, ``block`` only pairs within a block (other pairs count as 0).
        psd: project the matrix onto the positive semidefinite matrices, as the paper does.
    """

    pairs: str = "all"
    psd: bool = True

    def __post_init__(self) -> None:
        if self.pairs not in ("all", "block"):
            raise ValueError(f"pairs must be all or block, not '{self.pairs}'")


class Clado(GameEstimator):
    """CLADO (arXiv 2307.05657): ``Omega_ii = 2 (L(i) - L)``, ``Omega_ij = L(i, j) + L - L(i) - L(j)`` over single and
    double demotions from the widest, eigenvalues below zero clipped; the loss is ``q' Omega q / 2``.

    Cost: up to (n (m-1))^2 / 2 evaluations; with ``pairs=block`` only those within blocks.
    """

    Options = CladoOptions

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """The reference, and single and double demotions. In the order of their blocks, a double demotion shares all
        blocks in front of its second layer with the pick before it."""
        n, m = space.nbytes.shape
        blocks = np.array([layer.block for layer in space.layers])
        earlier = np.arange(n)  # (n,) layers that can be the first of a pair with this one
        if self.options.pairs == "block":
            earlier -= np.searchsorted(blocks, blocks)
        return Workload(losses_by_block(space, (m - 1) + (m - 1) ** 2 * earlier, whole=1), sets=1)

    def estimate(self, game: Game, rng: np.random.Generator) -> SensitivityEstimate:
        """The quadratic estimate; raises ImpqError if a loss is not finite."""
        space = game.space
        n, m = space.nbytes.shape
        moves = [(i, k) for i in range(n) for k in range(1, m)]  # (layer, choice)
        pairs = [(a, b) for a, (i, _) in enumerate(moves) for b, (j, _) in enumerate(moves) if i < j and (
            self.options.pairs == "all" or space.layers[i].block == space.layers[j].block)]
        picks = np.zeros((len(moves) + len(pairs), n), dtype=np.int64)
        for row, changes in enumerate([*((a,) for a in range(len(moves))), *pairs]):
            for change in changes:
                picks[row, moves[change][0]] = moves[change][1]
        game.expect(1 + len(picks))
        losses = game.losses(picks)
        if not np.isfinite(losses).all():
            raise ImpqError("a loss with one or two layers demoted is not finite: try --dtype float32 or wider --bits")
        single = losses[:len(moves)]
        matrix = np.diag(2 * single)  # (moves, moves)
        for (a, b), loss in zip(pairs, losses[len(moves):], strict=True):
            matrix[a, b] = matrix[b, a] = loss - single[a] - single[b]
        if self.options.psd:
            values, vectors = np.linalg.eigh(matrix)
            matrix = (vectors * np.maximum(values, 0.0)) @ vectors.T
        linear, pairwise = np.zeros((n, m)), np.zeros((n, m, n, m))
        linear[:, 1:] = np.diag(matrix).reshape(n, m - 1) / 2
        pairwise[:, 1:, :, 1:] = matrix.reshape(n, m - 1, n, m - 1)
        pairwise[np.arange(n), :, np.arange(n)] = 0.0
        return SensitivityEstimate(space, linear, pairwise, method=f"clado({self.options.pairs})",
                                   forwards=game.forwards)
