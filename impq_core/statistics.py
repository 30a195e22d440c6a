"""Statistics that several components share."""

from __future__ import annotations

import numpy as np

from impq_core.space import FloatArray, IntArray

ONE_ERROR = 0.8413447460685429
"""Probability that a normal value is less than one standard deviation above its mean."""


def mean(values: FloatArray, weights: IntArray | FloatArray | None = None) -> float:
    """The mean of ``values`` (n,), weighted by ``weights`` (n,) if these are given."""
    return float(values.mean() if weights is None else np.average(values, weights=weights))


def standard_error(values: FloatArray, weights: IntArray | FloatArray | None = None) -> float:
    """Standard error of the mean of ``values`` (n,): sample standard deviation (ddof=1) over sqrt(n), in their unit. Of
    a weighted mean, as of a ratio of two means (Cochran, Sampling Techniques, 1977, equation 6.13): that of the mean of
    ``weights (values - mean)``, over the mean of the weights.

    NaN if there are fewer than two values or any is not finite.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    if weights is not None:
        values = weights * (values - mean(values, weights)) / weights.mean()
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def student_errors(count: int) -> float:
    """How many standard errors of a mean of ``count`` values give a one-sided confidence of ``ONE_ERROR``.

    A quantile of Student's t distribution with ``count - 1`` degrees of freedom: 1.84 for two values, 1 for many. A
    count of 0 stands for many.
    """
    from scipy.stats import t

    return float(t.ppf(ONE_ERROR, count - 1 if count else np.inf))
