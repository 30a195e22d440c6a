"""Statistics that several components share."""

from __future__ import annotations

import numpy as np

from impq_core.space import FloatArray, IntArray


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


def confidence_below(limit: float, value: float, stderr: float, count: float) -> float:
    """Probability that a mean is at most ``limit``, given that ``value`` is the mean of ``count`` values and ``stderr``
    its standard error: of Student's t distribution with ``count - 1`` degrees of freedom. NaN if the error is unknown.
    """
    from scipy.stats import t

    if np.isnan(stderr) or count < 2:
        return float("nan")
    return float(value <= limit) if stderr == 0 else float(t.cdf((limit - value) / stderr, count - 1))
