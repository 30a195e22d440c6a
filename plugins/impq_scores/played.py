"""Estimators that play a few picks of the game."""

from __future__ import annotations

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Estimator, Game
from impq_core.types import SensitivityEstimate


class Isolated(Estimator):
    """Each layer at each narrower width, the others at the widest: ``linear[i, k] = loss(i at k) - loss(all-high)``.

    Cost: n (m-1) evaluations of about half a forward.
    """

    def estimate(self, game: Game, rng: np.random.Generator) -> SensitivityEstimate:
        """The additive estimate; raises ImpqError where a measured loss is not finite."""
        space = game.space
        n, m = space.nbytes.shape
        picks = np.zeros((n * (m - 1), n), dtype=np.int64)
        picks[np.arange(len(picks)), np.repeat(np.arange(n), m - 1)] = np.tile(np.arange(1, m), n)
        game.expect(1 + len(picks))
        # From the last layer to the first, so that a demotion's prefix is the reference's.
        losses = np.empty(len(picks))
        losses[::-1] = game.losses(picks[::-1])
        if not np.isfinite(losses).all():
            bad = space.layers[int(np.flatnonzero(~np.isfinite(losses))[0]) // (m - 1)].name
            raise ImpqError(f"the loss with {bad} demoted is not finite: try --dtype float32 or wider --bits")
        linear = np.concatenate([np.zeros((n, 1)), losses.reshape(n, m - 1)], axis=1)
        return SensitivityEstimate(space, linear, method="isolated", forwards=game.forwards)
