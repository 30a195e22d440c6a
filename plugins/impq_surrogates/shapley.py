"""Surrogates made of permutation marginals: Shapley values, with or without the paper's covariance."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Surrogate
from impq_core.space import FloatArray, IntArray
from impq_core.types import Measurements, SensitivityEstimate
from impq_surrogates.steps import from_quadratic, from_steps


class Additive(Surrogate):
    """Shapley values: ``phi = mean over permutations of the marginal costs`` (IMPQ, SPQE), summed over width steps.

    Steps that truncated permutations did not reach are left out of the mean, so that it is a mean over the coalitions
    of interest, before the collapse.
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
            raise ImpqError(f"no permutation reached every step of {layer}: play more of them, or truncate later")
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

    The players are width steps: q_(i,k) is 1 where layer i stands at choice k or narrower, so with two widths this is
    the paper's formula to the letter. The rows of C sum to zero, hence the objective equals
    ``(phi + diag C)'q + (1-alpha) q'Cq``, a mean-plus-variance rule; and a covariance of marginals is not an
    interaction: for two players it is negative whatever the sign of their joint effect. The objective ranks plans, and
    is no loss.
    """

    Options = CovarianceOptions

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The quadratic estimate; needs at least two permutations."""
        space = measurements.space
        marginals, replicates = _complete(measurements)
        paths, n, steps = marginals.shape
        if paths < 2:
            raise ImpqError("surrogate 'covariance' needs at least 2 permutations: a covariance of one is zero")
        values = marginals.reshape(paths, n * steps)
        phi = values.mean(axis=0)
        linear, quadratic = paper_form(phi, covariance(values), self.options.alpha)
        return SensitivityEstimate(space, *from_quadratic(space, linear, quadratic),
                                   stderr=_stderr(marginals, replicates),
                                   method=f"covariance(alpha={self.options.alpha:g})", forwards=measurements.forwards,
                                   nats=False)


def covariance(values: FloatArray) -> FloatArray:
    """``C = (DV - phi)'(DV - phi) / M`` of marginals DV (M, players)."""
    centred = values - values.mean(axis=0)
    result: FloatArray = centred.T @ centred / len(values)
    return result


def paper_form(phi: FloatArray, c: FloatArray, alpha: float) -> tuple[FloatArray, FloatArray]:
    """``(a, K)`` of the paper from Shapley values (players,) and covariance (players, players)."""
    diagonal = np.diag(np.diag(c))
    k = (1 - alpha) * c + alpha * diagonal
    return phi - (k.sum(axis=1) - np.diag(k)), k


def _complete(measurements: Measurements) -> tuple[FloatArray, IntArray]:
    marginals, replicates = measurements.marginals()
    if np.isnan(marginals).any():
        raise ImpqError("surrogate 'covariance' needs permutations that demote every layer to the narrowest width; "
                        "these were cut short (--surrogate additive allows it)")
    return marginals, replicates


def _stderr(marginals: FloatArray, replicates: IntArray) -> FloatArray:
    """Standard error (n, m) of the summed step means, over independent replicates; NaN where fewer than two tell."""
    costs = np.concatenate([np.zeros((*marginals.shape[:2], 1)), marginals.cumsum(axis=2)], axis=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing are NaN, which is what is wanted
        draws = np.stack([np.nanmean(costs[replicates == r], axis=0) for r in np.unique(replicates)])
        result: FloatArray = np.nanstd(draws, axis=0, ddof=1) / np.sqrt((~np.isnan(draws)).sum(axis=0))
    return result
