"""Statistics that several components share."""

from __future__ import annotations

import numpy as np

from impq_core.space import FloatArray


def standard_error(values: FloatArray) -> float:
    """Standard error of the mean of ``values`` (n,): sample standard deviation (ddof=1) over sqrt(n), in their unit.

    NaN if there are fewer than two values or any is not finite.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))
