"""Losses of the windows of a text, and their differences, paired over windows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from impq_core.space import FloatArray, IntArray
from impq_core.statistics import mean, standard_error


class Difference(NamedTuple):
    """Difference of two NLLs on the same windows, nats per token, and its standard error paired over windows (NaN if
    unknown)."""

    mean: float
    stderr: float

    @property
    def unsigned(self) -> str:
        """Its amount, without the sign."""
        return f"{abs(self.mean):.4f}{self._error}"

    @property
    def significant(self) -> bool:
        """Whether it exceeds two of its standard errors; true for any difference if the standard error is unknown."""
        return self.mean != 0 and not abs(self.mean) <= 2 * self.stderr

    @property
    def _error(self) -> str:
        return "" if math.isnan(self.stderr) else f" ± {self.stderr:.4f}"

    def __str__(self) -> str:
        return f"{self.mean:+.4f}{self._error}"


class WindowLosses:
    """Losses of an allocation on the windows of a text.

    Derived classes have ``window_nll``: float64 (windows,), the mean nats per token of each window; and
    ``window_tokens``: int64 (windows,), the scored tokens of each window, None if all windows have the same.
    """

    window_nll: FloatArray
    window_tokens: IntArray | None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return mean(self.window_nll, self.window_tokens)

    @property
    def stderr(self) -> float:
        """Standard error of ``nll`` over windows, nats per token."""
        return standard_error(self.window_nll, self.window_tokens)

    def minus(self, other: WindowLosses) -> Difference:
        """This NLL minus another on the same windows, paired."""
        with np.errstate(invalid="ignore"):  # infinite losses have no difference
            return Difference(self.nll - other.nll,
                              standard_error(self.window_nll - other.window_nll, self.window_tokens))
