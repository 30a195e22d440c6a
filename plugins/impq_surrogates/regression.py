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
        link: ``identity`` fits the loss, ``log1p`` log(1 + loss), which saturates more slowly; ``auto`` takes the one
            of less cross-validated error.
        prior: file of an estimate of the same layers and widths, such as the estimate.npz of another run: the prior is
            scaled to the losses, and only the residual is fitted. Empty for none.
    """

    link: str = "auto"
    prior: InputFile = NO_FILE

    def __post_init__(self) -> None:
        if self.link not in ("auto", "identity", "log1p"):
            raise ValueError(f"link must be auto, identity or log1p, not '{self.link}'")


@dataclass(frozen=True, eq=False)
class _Candidate:
    error: float
    link: str
    pairs: float
    penalty: float


class Regression(Surrogate):
    """Ridge regression of the losses on width steps taken and on their products, over every measurement.

    Penalty, share of the pair terms (none is among them) and link are chosen by cross-validation over whole replicates,
    in nats per token. Unlike a covariance of marginals it sees the sign of an interaction. Differences between sets of
    windows count as noise, which cross-validation does not reward. Features are never formed: for steps z and z' taken
    in two picks the kernel of the products is ``((z.z')^2 - sum_i (z_i.z'_i)^2) / 2``.
    """

    Options = RegressionOptions

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The fitted estimate.

        Raises:
            ImpqError: a loss is not finite, or there are fewer than two permutations.
        """
        measurements.require_finite()
        space = measurements.space
        rows = np.flatnonzero(measurements.picks.any(axis=1))
        if not len(rows):
            raise ImpqError("surrogate 'regression' needs losses of other picks than the reference")
        demoted = measurements.part(rows)
        steps = space.steps_taken(demoted.picks)
        single, pairs = _kernels(steps)
        scales = float(np.diag(single).mean()), float(np.diag(pairs).mean()) or 1.0
        links = ("identity", "log1p") if self.options.link == "auto" else (self.options.link,)
        prior = self._prior(space)
        base = prior.score(demoted.picks) if prior else np.zeros(len(demoted))
        best = min(self._candidates(demoted, base, single / scales[0], pairs / scales[1], links), key=lambda c: c.error)
        kernel = single / scales[0] + best.pairs * pairs / scales[1]
        target = _linked(demoted.losses, best.link)
        scale = _scale(target, base)
        weights = np.linalg.solve(kernel + best.penalty * np.eye(len(kernel)), target - scale * base)
        flat = steps.reshape(len(steps), -1)
        linear = weights @ flat / scales[0]
        matrix = best.pairs * (flat * weights[:, None]).T @ flat / scales[1]
        own = np.kron(np.eye(len(space)), np.ones((steps.shape[2],) * 2))
        matrix = np.where(own > 0, 0.0, matrix)
        costs, terms = from_quadratic(space, linear, 0.5 * matrix)
        joint = terms if best.pairs else None
        if prior:
            costs = costs + scale * prior.linear
            if prior.pairwise is not None:
                joint = scale * prior.pairwise + (0.0 if joint is None else joint)
        link = None
        if best.link == "log1p":
            scores = np.linspace(0.0, 2.0 * float(_linked(demoted.losses, best.link).max()) + 1.0, 513)
            link = np.stack([scores, np.expm1(scores)])
        beyond = f", beyond {prior.method}" if prior else ""
        return SensitivityEstimate(space, costs, joint, forwards=measurements.forwards, link=link,
                                   method=f"regression({best.link}, pairs {best.pairs:g}{beyond})")

    def check_space(self, space: SearchSpace) -> None:
        """Raises ImpqError if the prior cannot be read or has other layers or widths."""
        self._prior(space)

    def _prior(self, space: SearchSpace) -> SensitivityEstimate | None:
        if not self.options.prior:
            return None
        try:
            return SensitivityEstimate.load(Path(self.options.prior)).on(space)
        except (OSError, ValueError, KeyError, ImpqError) as error:
            raise ImpqError(f"surrogate regression: prior {self.options.prior} is no estimate of this model's layers "
                            f"and widths ({error})") from error

    def _candidates(self, demoted: Measurements, base: FloatArray, single: FloatArray, pairs: FloatArray,
                    links: tuple[str, ...]) -> Iterator[_Candidate]:
        splits = list(folds(demoted))
        for share in PAIR_SHARES:
            kernel = single + share * pairs
            squares = {(link, penalty): 0.0 for link in links for penalty in PENALTIES}
            for kept, held in splits:
                values, vectors = np.linalg.eigh(kernel[np.ix_(kept, kept)])
                across = kernel[np.ix_(held, kept)] @ vectors
                for link, penalty in squares:
                    target = _linked(demoted.losses[kept], link)
                    scale = _scale(target, base[kept])
                    target = vectors.T @ (target - scale * base[kept])
                    guess = across @ (target / (np.maximum(values, 0.0) + penalty)) + scale * base[held]
                    loss = np.expm1(np.minimum(guess, 20.0)) if link == "log1p" else guess
                    squares[link, penalty] += float(((loss - demoted.losses[held]) ** 2).sum())
            for (link, penalty), square in squares.items():
                yield _Candidate(square, link, share, penalty)


class Coverage(Surrogate):
    """``loss = c (1 - prod_i (1 - a_{i, q_i}))`` (arXiv 2607.12266): each layer covers a share of the largest loss c,
    at which the loss saturates. n (m-1) + 1 parameters, costs that never fall with narrower widths, fitted by non-
    negative least squares with a weight on each measurement that makes the errors those of the loss, for the best c
    of a grid.

    It cannot follow a game whose joint damage exceeds the sum of single damages.
    """

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The fitted estimate.

        Raises:
            ImpqError: a loss is not finite, or none is above the reference.
        """
        from scipy.optimize import nnls

        measurements.require_finite()
        space = measurements.space
        rows = np.flatnonzero(measurements.picks.any(axis=1))
        losses = measurements.losses[rows]
        if not len(rows) or losses.max() <= 0:
            raise ImpqError("surrogate 'coverage' needs losses above the reference")
        flat = space.steps_taken(measurements.picks[rows]).reshape(len(rows), -1)
        best = (np.inf, 0.0, np.zeros(flat.shape[1]))
        for ceiling in float(losses.max()) * (1.0 + 10.0 ** np.linspace(-2.0, 2.0, 33)):
            slope = 1.0 - losses / ceiling
            # d loss = c (1 - loss/c) d score: with these weights the errors are the loss's, to first order.
            scores, _ = nnls(flat * slope[:, None], -np.log(slope) * slope)
            square = float(((ceiling * -np.expm1(-flat @ scores) - losses) ** 2).sum())
            if square < best[0]:
                best = (square, ceiling, scores)
        _, ceiling, scores = best
        places = np.linspace(0.0, min(30.0, 2.0 * float(scores.sum()) + 1.0), 513)
        return SensitivityEstimate(space, from_steps(scores.reshape(len(space), -1)), forwards=measurements.forwards,
                                   method=f"coverage(c={ceiling:.3g})",
                                   link=np.stack([places, ceiling * -np.expm1(-places)]))


def _kernels(steps: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Inner products (N, N) of the steps taken, and of the products of steps of different layers."""
    flat = steps.reshape(len(steps), -1)
    single = flat @ flat.T
    same = np.zeros_like(single)
    for layer in steps.transpose(1, 0, 2):
        same += (layer @ layer.T) ** 2
    return single, (single**2 - same) / 2


def _scale(target: FloatArray, base: FloatArray) -> float:
    """The factor of ``base`` that comes nearest to ``target`` in least squares."""
    square = float(base @ base)
    return float(target @ base) / square if square else 0.0


def _linked(losses: FloatArray, link: str) -> FloatArray:
    return np.log1p(np.maximum(losses, -0.9)) if link == "log1p" else losses
