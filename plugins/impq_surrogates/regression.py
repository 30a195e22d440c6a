"""Surrogates fitted to all measured losses by least squares: ridge regression, and the coverage model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import NO_FILE, InputFile, Surrogate
from impq_core.space import FloatArray, SearchSpace
from impq_core.types import Measurements, SensitivityEstimate
from impq_core.validation import folds
from impq_surrogates.steps import from_quadratic, from_steps

PENALTIES = 10.0 ** np.arange(-7.0, 2.0)
"""Ridge penalties tried, relative to features scaled to a mean square of 1."""

PAIR_SHARES = (0.0, 1e-3, 1e-2, 0.1, 1.0)
"""Prior variance of the pair terms tried, relative to that of the single ones."""


@dataclass(frozen=True)
class RegressionOptions:
    """Options of the regression surrogate.

    Args:
        link: ``identity`` fits the loss, ``log1p`` log(1 + loss), which saturates more slowly; ``auto`` takes the link
            with the smaller cross-validated error.
        prior: file of an estimate of the same layers and widths, such as the estimate.npz of another run. The
            regression is fitted to the losses minus the scaled scores of the prior. Empty for none.
    """

    link: str = "auto"
    prior: InputFile = NO_FILE

    def __post_init__(self) -> None:
        if self.link not in ("auto", "identity", "log1p"):
            raise ValueError(f"link must be auto, identity or log1p, not '{self.link}'")


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Hyperparameters of a fit, and its cross-validated sum of squared errors."""

    error: float
    link: str
    pairs: float
    penalty: float


class Regression(Surrogate):
    """Ridge regression of the losses on the width steps taken and on products of steps of different layers.

    Penalty, prior variance of the pair terms (0 is among the candidates) and link are chosen by cross-validation over
    whole replicates, in nats per token. Unlike a covariance of marginals, the pair terms have the sign of the
    interaction. Differences between sets of windows count as noise. The products are never formed: for step indicators
    z and z' of two picks their kernel is ``((z.z')^2 - sum_i (z_i.z'_i)^2) / 2``.
    """

    Options = RegressionOptions

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The fitted estimate.

        Raises:
            ImpqError: a loss is not finite, there are fewer than two permutations, or no pick but the reference was
                measured.
        """
        measurements.require_finite()
        space = measurements.space
        rows = np.flatnonzero(measurements.picks.any(axis=1))
        if not len(rows):
            raise ImpqError("surrogate 'regression' needs losses of other picks than the reference")
        measured = measurements.part(rows)
        steps = space.steps_taken(measured.picks)  # (N, n, m-1)
        single, pairs = _kernels(steps)  # (N, N) each
        single_scale, pair_scale = float(np.diag(single).mean()), float(np.diag(pairs).mean()) or 1.0
        links = ("identity", "log1p") if self.options.link == "auto" else (self.options.link,)
        prior = self._prior(space)
        prior_scores = prior.score(measured.picks) if prior else np.zeros(len(measured))
        candidates = self._candidates(measured, prior_scores, single / single_scale, pairs / pair_scale, links)
        best = min(candidates, key=lambda candidate: candidate.error)
        # Kernel ridge regression of the linked losses minus the scaled prior.
        kernel = single / single_scale + best.pairs * pairs / pair_scale
        target = _linked(measured.losses, best.link)
        scale = _scale(target, prior_scores)
        weights = np.linalg.solve(kernel + best.penalty * np.eye(len(kernel)), target - scale * prior_scores)  # (N,)
        # Back to coefficients of the n (m-1) steps and of their products; products within a layer have none.
        flat = steps.reshape(len(steps), -1)  # (N, n (m-1))
        linear = weights @ flat / single_scale
        matrix = best.pairs * (flat * weights[:, None]).T @ flat / pair_scale
        same_layer = np.kron(np.eye(len(space)), np.ones((steps.shape[2],) * 2)) > 0
        matrix = np.where(same_layer, 0.0, matrix)
        costs, pair_costs = from_quadratic(space, linear, 0.5 * matrix)
        pairwise = pair_costs if best.pairs else None
        if prior:
            costs = costs + scale * prior.linear
            if prior.pairwise is not None:
                pairwise = scale * prior.pairwise + (0.0 if pairwise is None else pairwise)
        link = None
        if best.link == "log1p":
            scores = np.linspace(0.0, 2.0 * float(target.max()) + 1.0, 513)
            link = np.stack([scores, np.expm1(scores)])
        beyond = f", beyond {prior.method}" if prior else ""
        return SensitivityEstimate(space, costs, pairwise, forwards=measurements.forwards, link=link,
                                   method=f"regression({best.link}, pairs {best.pairs:g}{beyond})")

    def check_space(self, space: SearchSpace) -> None:
        """Raises ImpqError if the prior cannot be read, or is of other layers or widths."""
        self._prior(space)

    def _prior(self, space: SearchSpace) -> SensitivityEstimate | None:
        if not self.options.prior:
            return None
        try:
            return SensitivityEstimate.load(Path(self.options.prior)).on(space)
        except (OSError, ValueError, KeyError, ImpqError) as error:
            raise ImpqError(f"surrogate regression: prior {self.options.prior} is no estimate of this model's layers "
                            f"and widths ({error})") from error

    def _candidates(self, measured: Measurements, prior_scores: FloatArray, single: FloatArray, pairs: FloatArray,
                    links: tuple[str, ...]) -> Iterator[_Candidate]:
        """Cross-validate every combination of hyperparameters. An eigendecomposition of each fold's kernel serves all
        penalties and links."""
        splits = list(folds(measured))
        for share in PAIR_SHARES:
            kernel = single + share * pairs
            squares = {(link, penalty): 0.0 for link in links for penalty in PENALTIES}
            for kept, held in splits:
                values, vectors = np.linalg.eigh(kernel[np.ix_(kept, kept)])
                across = kernel[np.ix_(held, kept)] @ vectors  # (held, kept)
                for link, penalty in squares:
                    target = _linked(measured.losses[kept], link)
                    scale = _scale(target, prior_scores[kept])
                    rotated = vectors.T @ (target - scale * prior_scores[kept])
                    scores = across @ (rotated / (np.maximum(values, 0.0) + penalty)) + scale * prior_scores[held]
                    losses = np.expm1(np.minimum(scores, 20.0)) if link == "log1p" else scores
                    squares[link, penalty] += float(((losses - measured.losses[held]) ** 2).sum())
            for (link, penalty), square in squares.items():
                yield _Candidate(square, link, share, penalty)


class Coverage(Surrogate):
    """``loss = c (1 - prod_i (1 - a_{i, q_i}))`` (arXiv 2607.12266): each layer covers a share of the ceiling c, at
    which the loss saturates.

    The score ``-log(1 - loss/c)`` is additive. For each c of a grid, non-negative least squares fits a cost to each of
    the n (m-1) width steps, so that costs never fall with narrower widths; weights turn the residuals of scores into
    residuals of losses to first order. The c of the smallest squared error of the loss is taken.

    The model cannot describe a game in which joint damage exceeds the sum of the single damages.
    """

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The fitted estimate; raises ImpqError if a loss is not finite, or none exceeds the reference's."""
        from scipy.optimize import nnls

        measurements.require_finite()
        space = measurements.space
        rows = np.flatnonzero(measurements.picks.any(axis=1))
        losses = measurements.losses[rows]
        if not len(rows) or losses.max() <= 0:
            raise ImpqError("surrogate 'coverage' needs losses above the reference")
        flat = space.steps_taken(measurements.picks[rows]).reshape(len(rows), -1)  # (N, n (m-1))
        best = (np.inf, 0.0, np.zeros(flat.shape[1]))
        for ceiling in float(losses.max()) * (1.0 + 10.0 ** np.linspace(-2.0, 2.0, 33)):
            uncovered = 1.0 - losses / ceiling  # (N,), exp(-score)
            # d loss = c (1 - loss/c) d score: these weights turn errors of scores into errors of losses.
            costs, _ = nnls(flat * uncovered[:, None], -np.log(uncovered) * uncovered)
            predicted = ceiling * -np.expm1(-flat @ costs)
            square = float(((predicted - losses) ** 2).sum())
            if square < best[0]:
                best = (square, ceiling, costs)
        _, ceiling, costs = best
        scores = np.linspace(0.0, min(30.0, 2.0 * float(costs.sum()) + 1.0), 513)
        return SensitivityEstimate(space, from_steps(costs.reshape(len(space), -1)), forwards=measurements.forwards,
                                   method=f"coverage(c={ceiling:.3g})",
                                   link=np.stack([scores, ceiling * -np.expm1(-scores)]))


def _kernels(steps: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Kernels (N, N) of the step indicators (N, n, m-1), and of the products of steps of different layers."""
    flat = steps.reshape(len(steps), -1)
    single = flat @ flat.T
    within = np.zeros_like(single)  # products of steps of one layer
    for layer in steps.transpose(1, 0, 2):
        within += (layer @ layer.T) ** 2
    return single, (single**2 - within) / 2


def _scale(target: FloatArray, scores: FloatArray) -> float:
    """The factor of ``scores`` (N,) that fits ``target`` (N,) best, by least squares."""
    size = float(scores @ scores)
    return float(target @ scores) / size if size else 0.0


def _linked(losses: FloatArray, link: str) -> FloatArray:
    return np.log1p(np.maximum(losses, -0.9)) if link == "log1p" else losses
