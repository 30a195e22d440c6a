"""Estimators that play a few picks of the game."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError, UsageError
from impq_core.interfaces import Estimator, Game
from impq_core.space import SearchSpace
from impq_core.types import SensitivityEstimate


@dataclass(frozen=True)
class IsolatedOptions:
    """Options of the isolated estimator.

    Args:
        base: width in bits at which the other layers stand; 0 is the widest. A width near the budget measures layers
            where the plan will be: a demotion costs more among narrow neighbours than among wide ones.
    """

    base: float = 0.0

    def __post_init__(self) -> None:
        if self.base < 0:
            raise ValueError("base must be one of the widths played, or 0")


class Isolated(Estimator):
    """Each layer at each other width, the others at the base: ``linear[i, k] = loss(i at k) - loss(i at the widest)``.

    Cost: n (m-1) evaluations of about half a forward.
    """

    Options = IsolatedOptions

    def check_space(self, space: SearchSpace) -> None:
        """The base must be on the menu."""
        if self.options.base and self.options.base not in _widths(space):
            raise UsageError(f"estimator isolated: base={self.options.base:g} is none of the widths played "
                             f"({', '.join(f'{bits:g}' for bits in _widths(space))})")

    def estimate(self, game: Game, rng: np.random.Generator) -> SensitivityEstimate:
        """The additive estimate; raises ImpqError where a loss is not finite."""
        space = game.space
        n, m = space.nbytes.shape
        base = _widths(space).index(self.options.base) if self.options.base else 0
        picks = np.tile(space.uniform(base), (n, m, 1))
        picks[np.arange(n)[:, None], np.arange(m), np.arange(n)[:, None]] = np.arange(m)
        game.expect(1 + n * (m - 1))
        # From the last layer to the first, so that each prefix is the base's.
        losses = game.losses(picks[::-1].reshape(n * m, n)).reshape(n, m)[::-1]
        if not np.isfinite(losses).all():
            bad = space.layers[int(np.argwhere(~np.isfinite(losses))[0, 0])].name
            raise ImpqError(f"the loss with {bad} moved is not finite: try --dtype float32 or wider --bits")
        method = f"isolated(base={self.options.base:g})" if base else "isolated"
        return SensitivityEstimate(space, losses - losses[:, :1], method=method, forwards=game.forwards)


def _widths(space: SearchSpace) -> list[float]:
    return [choice.bits for choice in space.choices]
