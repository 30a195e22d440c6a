"""The incumbent plan: another replaces it only if it wins on windows held back."""

from __future__ import annotations

import math

import numpy as np

from impq_core.interfaces import Game
from impq_core.space import FloatArray, IntArray
from impq_core.statistics import standard_error


class Incumbent:
    """A pick that only better ones replace. A loss that is not finite is worse than any that is.

    Args:
        pick: (n,), where to begin.
        game: proposals are measured on it.
        referee: decides on other windows.
        forwards: what both may spend.
    """

    def __init__(self, pick: IntArray, game: Game, referee: Game, forwards: float) -> None:
        self.pick = pick
        self._game, self._referee, self._forwards = game, referee, forwards
        self._spent_before = game.forwards + referee.forwards
        self._losses, self._judged = game.window_losses(pick), referee.window_losses(pick)
        self.seen = {pick.tobytes()}
        self.taken = 0

    @property
    def may_go_on(self) -> bool:
        """Whether forwards are left."""
        return self._game.forwards + self._referee.forwards - self._spent_before < self._forwards

    def measure(self, pick: IntArray) -> tuple[float, float]:
        """A pick's loss in the game above the incumbent's, and its standard error (``difference``)."""
        self.seen.add(pick.tobytes())
        return difference(self._game.window_losses(pick), self._losses)

    def challenge(self, pick: IntArray) -> bool:
        """Put a pick that won in the game before the referee, and take it if it wins there by more than a standard
        error."""
        judged = self._referee.window_losses(pick)
        mean, stderr = difference(judged, self._judged)
        if not mean < -stderr:
            return False
        self.pick, self._losses, self._judged = pick, self._game.window_losses(pick), judged
        self.taken += 1
        return True


def difference(losses: FloatArray, others: FloatArray) -> tuple[float, float]:
    """Mean of ``losses - others`` over windows and its standard error, nats per token.

    The error of a single window is unknown and counts as 0. The mean is infinite if ``losses`` are not all finite, and
    minus infinite if only ``others`` are not.
    """
    for values, mean in ((losses, math.inf), (others, -math.inf)):
        if not np.isfinite(values).all():
            return mean, 0.0
    stderr = standard_error(losses - others)
    return float((losses - others).mean()), 0.0 if math.isnan(stderr) else stderr
