"""Surrogates from permutation marginals: Shapley values, with or without the paper's covariance."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Surrogate
from impq_core.space import FloatArray, IntArray
from impq_core.statistics import standard_error
from impq_core.types import Measurements, SensitivityEstimate
from impq_surrogates.steps import from_quadratic, from_steps


class Additive(Surrogate):
    """Shapley values: ``phi = mean over permutations of the marginal costs`` (IMPQ, SPQE), summed over width steps.

    The mean of a step is over the permutations that reached it, if some were truncated: over the coalitions before the
    collapse.
    """

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The additive estimate; its standard errors are over independent replicates (NaN with one).

        Raises:
            ImpqError: a step was reached by no permutation.
        """
        marginals, replicates = measurements.marginals()
        unreached = np.isnan(marginals).all(axis=0)
        if unreached.any():
            layer = measurements.space.layers[int(np.argwhere(unreached)[0, 0])].name
            raise ImpqError(f"surrogate 'additive': no permutation reached every step of {layer}; raise -o "
                            "permutations or -o truncate")
        return SensitivityEstimate(
            measurements.space, from_steps(np.nanmean(marginals, axis=0)), stderr=_stderr(marginals, replicates),
            method="additive", forwards=measurements.forwards)


@dataclass(frozen=True)
class CovarianceOptions:
    """Options of the covariance surrogate.

    Args:
        alpha: shrinkage of the covariance towards its diagonal, 0 to 1 (the paper: 0.5); 1 is an additive model.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {self.alpha}")


class Covariance(Surrogate):
    """The paper's quadratic form: ``K = (1-alpha) C + alpha diag C``, ``a_i = phi_i - sum_{j!=i} K_ij``, objective
    ``a'q + q'Kq`` (IMPQ, section on allocation), with C the covariance of the permutation marginals.

    The players are width steps: q_(i,k) is 1 if layer i is at choice k or narrower. With two widths this is exactly the
    paper's formula. C is computed within sets of windows (``covariance``): the marginals of every order of a set add up
    to the same total, so the rows of C sum to zero, and the objective equals ``(phi + diag C)'q + (1-alpha) q'Cq``, a
    mean-plus-variance rule. A covariance of marginals is not an interaction: for two players it is negative whatever
    the sign of their joint effect. The objective ranks plans and is no loss.
    """

    Options = CovarianceOptions

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The quadratic estimate.

        Raises:
            ImpqError: no two permutations were played on the same windows, or one was cut short.
        """
        space = measurements.space
        marginals, replicates = measurements.marginals()
        if np.isnan(marginals).any():
            raise ImpqError("surrogate 'covariance' needs permutations that demote every layer to the narrowest width; "
                            "these were cut short (--surrogate additive allows it)")
        paths, n, steps = marginals.shape
        windows = measurements.windows[np.unique(measurements.path, return_index=True)[1]]
        if len(np.unique(windows)) == paths:
            raise ImpqError("surrogate 'covariance' needs at least 2 permutations on the same calibration windows: "
                            "say -o antithetic=true or -o fresh=false, or --surrogate additive")
        values = marginals.reshape(paths, n * steps)
        linear, quadratic = paper_form(values.mean(axis=0), covariance(values, windows), self.options.alpha)
        return SensitivityEstimate(space, *from_quadratic(space, linear, quadratic),
                                   stderr=_stderr(marginals, replicates),
                                   method=f"covariance(alpha={self.options.alpha:g})", forwards=measurements.forwards,
                                   is_loss=False)


def covariance(values: FloatArray, windows: IntArray) -> FloatArray:
    """``C = 1/M sum_p (DV_p - phi_s(p))(DV_p - phi_s(p))'`` with ``phi_s`` the mean over the orders of set s.

    With one set of windows this is the paper's C. If the game has interactions of at most two players and the sets of
    windows differ by additive costs only, an order and its reverse give the same C on any set: additive costs cancel in
    the deviations.

    Args:
        values: marginals DV (M, players).
        windows: (M,) the set of windows of each order; the only order of a set has no deviation and does not count.
    """
    _, sets, orders = np.unique(windows, return_inverse=True, return_counts=True)  # orders: (sets,) orders of a set
    totals = np.zeros((len(orders), values.shape[1]))
    np.add.at(totals, sets, values)
    deviations = values - (totals / orders[:, None])[sets]
    counted = max(1, int(orders[orders > 1].sum()))
    result: FloatArray = deviations.T @ deviations / counted
    return result


def paper_form(phi: FloatArray, c: FloatArray, alpha: float) -> tuple[FloatArray, FloatArray]:
    """``(a, K)`` of the paper from Shapley values (players,) and covariance (players, players)."""
    diagonal = np.diag(np.diag(c))
    k = (1 - alpha) * c + alpha * diagonal
    return phi - (k.sum(axis=1) - np.diag(k)), k


def _stderr(marginals: FloatArray, replicates: IntArray) -> FloatArray:
    """Standard errors (n, m) of the summed step means, over the independent replicates that reached the step; NaN if
    fewer than two reached it."""
    costs = np.concatenate([np.zeros((*marginals.shape[:2], 1)), marginals.cumsum(axis=2)], axis=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no values is NaN, as it should be
        draws = np.stack([np.nanmean(costs[replicates == r], axis=0) for r in np.unique(replicates)])
    result: FloatArray = np.apply_along_axis(lambda costs: standard_error(costs[~np.isnan(costs)]), 0, draws)
    return result
