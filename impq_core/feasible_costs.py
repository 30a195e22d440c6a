"""Costs of choices as they can be: no choice costs less than the reference, and no narrower width less than a wider
one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from impq_core.space import FloatArray
from impq_core.types import SensitivityEstimate


def feasible(estimate: SensitivityEstimate) -> SensitivityEstimate:
    """The nearest estimate, in least squares, whose costs are at least 0 and grow from each width of a layer to the
    next smaller one (isotonic regression; choices are in the order of stored bytes). Costs that break this are noise of
    the text, which a program without these bounds prefers.

    Estimates with pair terms stay as they are, because a cost depends on the other layers there; of menus with other
    forms than plain widths, such as ``Q4_K``, costs are only made at least 0: a smaller form of another family may be
    the better one.
    """
    if estimate.pairwise is not None:
        return estimate
    costs = np.maximum(estimate.linear, 0.0)
    if all(choice.is_width for choice in estimate.space.choices):
        costs = increasing(estimate.linear)
    return estimate if np.array_equal(costs, estimate.linear) else replace(estimate, linear=costs)


def increasing(costs: FloatArray) -> FloatArray:
    """The nearest costs (n, m) whose first column is 0 and that never fall from a choice to the next.

    By the formula ``max_{j<=k} min_{l>=k} mean(costs[j..l])`` of isotonic regression (Robertson, Wright and Dykstra,
    Order Restricted Statistical Inference, 1988, theorem 1.4.4), with 0 as the least cost.
    """
    broken = (np.diff(costs, axis=1) < 0).any(axis=1)  # other layers keep their costs bit for bit
    values = costs[broken]
    n, m = values.shape
    sums = np.concatenate([np.zeros((n, 1)), values[:, 1:].cumsum(axis=1)], axis=1)
    fitted = np.zeros((n, m))
    for k in range(1, m):
        means = [np.min([(sums[:, end] - sums[:, start]) / (end - start) for end in range(k, m)], axis=0)
                 for start in range(k)]
        fitted[:, k] = np.maximum(np.max(means, axis=0), fitted[:, k - 1])
    result = costs.copy()
    result[broken] = fitted
    return result
