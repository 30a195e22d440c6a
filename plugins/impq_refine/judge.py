"""The incumbent plan of a refinement: a challenger replaces it only if it wins on held-back windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from impq_core.interfaces import Game
from impq_core.space import FloatArray, IntArray
from impq_core.statistics import standard_error


class Incumbent:
    """The current pick of a refinement, and its losses. A loss that is not finite is worse than any finite loss.

    Args:
        pick: (n,), the start.
        game: proposals are measured on its windows.
        referee: the same model on other windows, which decide.
        forwards: the limit for both games together, in full-model forwards.
    """

    def __init__(self, pick: IntArray, game: Game, referee: Game, forwards: float) -> None:
        self.pick = pick
        self._game, self._referee, self._forwards = game, referee, forwards
        self._spent_before = game.forwards + referee.forwards
        self._losses, self._referee_losses = game.window_losses(pick), referee.window_losses(pick)
        self.measured = {pick.tobytes()}
        self.taken = 0

    @property
    def may_go_on(self) -> bool:
        """Whether the limit of forwards is not reached yet."""
        return self._game.forwards + self._referee.forwards - self._spent_before < self._forwards

    def expect(self, picks: Sequence[IntArray]) -> None:
        """Say which picks are measured next: workers measure them side by side."""
        self._game.expect(len(self.measured) + len(picks), wanted=[(0, np.stack(picks))])

    def measure(self, pick: IntArray) -> tuple[float, float]:
        """A pick's loss in the game minus the incumbent's, and its standard error (``difference``)."""
        self.measured.add(pick.tobytes())
        return difference(self._game.window_losses(pick), self._losses)

    def challenge(self, pick: IntArray) -> bool:
        """Measure a pick on the referee's windows, and replace the incumbent if the pick's loss there is smaller by
        more than a standard error. Returns whether it was replaced."""
        referee_losses = self._referee.window_losses(pick)
        mean, stderr = difference(referee_losses, self._referee_losses)
        if not mean < -stderr:
            return False
        self.pick, self._losses, self._referee_losses = pick, self._game.window_losses(pick), referee_losses
        self.taken += 1
        return True


def difference(losses: FloatArray, others: FloatArray) -> tuple[float, float]:
    """Mean of ``losses - others`` over windows and its standard error, nats per token.

    The standard error is 0 for a single window. The mean is infinite if ``losses`` are not all finite, and minus
    infinite if only ``others`` are not.
    """
    for values, mean in ((losses, math.inf), (others, -math.inf)):
        if not np.isfinite(values).all():
            return mean, 0.0
    stderr = standard_error(losses - others)
    return float((losses - others).mean()), 0.0 if math.isnan(stderr) else stderr
