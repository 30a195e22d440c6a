"""The incumbent plan and its judge: nothing replaces it that does not win on windows held back."""

from __future__ import annotations

import math

import numpy as np

from impq_core.interfaces import Game
from impq_core.space import FloatArray, IntArray


class Incumbent:
    """A pick that only better ones replace.

    Args:
        pick: (n,), where to begin.
        game: proposals are measured on it.
        referee: has the last word, on other windows.
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

    def measure(self, pick: IntArray) -> FloatArray:
        """The pick's loss minus the incumbent's, by window of the game."""
        self.seen.add(pick.tobytes())
        return self._game.window_losses(pick) - self._losses

    def challenge(self, pick: IntArray) -> bool:
        """Put a pick that won in the game before the referee, and take it if it wins there by more than a standard
        error."""
        judged = self._referee.window_losses(pick)
        mean, stderr = mean_and_stderr(judged - self._judged)
        if not mean < -stderr:
            return False
        self.pick, self._losses, self._judged = pick, self._game.window_losses(pick), judged
        self.taken += 1
        return True


def mean_and_stderr(values: FloatArray) -> tuple[float, float]:
    """Mean and standard error over windows; with one window the error is unknown and counts as 0."""
    stderr = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(values.mean()), stderr
