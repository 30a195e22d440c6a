"""Estimators that read how the loss would change from gradients: a few forwards for any number of layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impq_core.interfaces import Inspector, Probe
from impq_core.space import FloatArray, SearchSpace
from impq_core.types import SensitivityEstimate


class LlmMq(Inspector):
    """LLM-MQ (NeurIPS 2023 ENLSP): ``s_{i,b} = |g_i . (W_i - Q_b(W_i))|``, first order, at the unquantized weights.
    The inner product can cancel, so its absolute value is taken per window and averaged over windows.

    The cost of a choice is its score minus the reference's, and never less than zero; it ranks, and is no loss.
    """

    needs = frozenset({"gradients"})

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """One backward a window: three forwards in all."""
        scores = np.abs(probe.slopes()).mean(axis=0)
        linear = np.maximum(scores - scores[:, :1], 0.0)
        return SensitivityEstimate(probe.space, linear, method="llm-mq", forwards=probe.forwards, is_loss=False)


@dataclass(frozen=True)
class FisherOptions:
    """Options of the Fisher estimator.

    Args:
        at: where the gradients are taken, from 0 (all layers at the widest choice) to 1 (all at the narrowest); between
            two choices the weights are blended.
        curvature: weight of the second-order term; at 1 it is several times too large on a damaged model, whose
            residuals the empirical Fisher matrix takes for curvature.
    """

    at: float = 0.25
    curvature: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.at <= 1 or self.curvature < 0:
            raise ValueError("at must lie between 0 and 1, curvature must not be negative")


class Fisher(Inspector):
    """The loss to second order around one point, from one backward pass a window.

    With ``u[s, i, k]`` the first-order change of window s's mean loss when layer i moves to choice k, the change of
    the loss is ``sum_i mean_s u + (T/2) Var_s(sum_i u)``: the variance over windows, times the T tokens of a window,
    stands for the Gauss-Newton (empirical Fisher) matrix, as if the gradients of different tokens were independent.
    The cross terms are the covariances of the layers' changes, so the whole interaction matrix costs three forwards.
    """

    Options = FisherOptions
    needs = frozenset({"gradients"})

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """One backward a window: three forwards in all."""
        space = probe.space
        slopes = probe.slopes(shares_at(space, self.options.at))
        windows, n, m = slopes.shape
        flat = slopes.reshape(windows, n * m)
        curvature = self.options.curvature * probe.window_tokens
        matrix = (curvature * np.cov(flat.T, bias=True)).reshape(n, m, n, m) if windows > 1 else None
        return quadratic(space, slopes.mean(axis=0), matrix, f"fisher(at={self.options.at:g})", probe.forwards)


@dataclass(frozen=True)
class AumannShapleyOptions:
    """Options of the Aumann-Shapley estimator.

    Args:
        nodes: Gauss-Legendre nodes on each step from a width to the next.
    """

    nodes: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 8:
            raise ValueError(f"nodes must be 1 to 8, not {self.nodes}")


class AumannShapley(Inspector):
    """Aumann-Shapley values: the cost of a step is the integral of its slope along the path on which all layers go
    together from each width to the next, their weights blended. On a straight path the values add up to the loss of the
    all-narrowest model above the all-widest."""

    Options = AumannShapleyOptions
    needs = frozenset({"gradients"})

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """``nodes`` backwards a window and width step: three forwards each."""
        space = probe.space
        n, m = space.nbytes.shape
        places, weights = np.polynomial.legendre.leggauss(self.options.nodes)
        linear = np.zeros((n, m))
        for step in range(m - 1):
            for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
                slopes = probe.slopes(shares_at(space, (step + place) / (m - 1))).mean(axis=0)
                linear[:, step + 1:] += weight * (slopes[:, step + 1] - slopes[:, step])[:, None]
        return SensitivityEstimate(space, linear, method=f"aumann-shapley({self.options.nodes} nodes)",
                                   forwards=probe.forwards)


@dataclass(frozen=True)
class HawqOptions:
    """Options of the HAWQ estimator.

    Args:
        samples: random vectors for the Hessian traces, six forwards each.
    """

    samples: int = 2

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")


class Hawq(Inspector):
    """HAWQ-V2 (arXiv 1911.03852): ``1/2 sum_l trace(H_l) / size_l ||Q_b(W_l) - W_l||^2`` over a layer's linears, the
    second-order term of the loss at the unquantized weights with each linear's average curvature for all directions.

    The cost of a choice is its term minus the reference's, and never less than zero; so is a trace, which is the
    curvature of the loss itself and not of a Gauss-Newton matrix.
    """

    Options = HawqOptions
    needs = frozenset({"gradients"})

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """``samples`` draws of the traces: six forwards each."""
        space = probe.space
        draws = [probe.hessian_traces(rng) for _ in range(self.options.samples)]
        terms = np.zeros((len(draws), *space.nbytes.shape))
        linear = np.zeros(space.nbytes.shape)
        for i, layer in enumerate(space.layers):
            for spec in layer.linears:
                weight = probe.weight(spec)
                errors = np.array([float((probe.variant(spec, choice) - weight).square().sum())
                                   for choice in space.choices])
                traces = np.array([draw[spec] for draw in draws])
                terms[:, i] += 0.5 * traces[:, None] / spec.parameters * (errors - errors[0])
                linear[i] += 0.5 * np.maximum(0.0, traces.mean()) / spec.parameters * errors  # a NaN stays one
        several = len(draws) > 1
        stderr = terms.std(axis=0, ddof=1) / np.sqrt(len(draws)) if several else np.full(linear.shape, np.nan)
        return SensitivityEstimate(space, np.maximum(linear - linear[:, :1], 0.0), stderr=stderr,
                                   method=f"hawq({len(draws)} samples)", forwards=probe.forwards)


def shares_at(space: SearchSpace, at: float) -> FloatArray:
    """Shares (m,) of the two choices on either side of a place between all-widest (0) and all-narrowest (1)."""
    m = len(space.choices)
    shares = np.maximum(0.0, 1.0 - np.abs(at * (m - 1) - np.arange(m)))
    return shares


def quadratic(space: SearchSpace, slope: FloatArray, matrix: FloatArray | None, method: str,
              forwards: float) -> SensitivityEstimate:
    """The estimate that says ``sum_i slope[i, q_i] + 1/2 sum_ij matrix[i, q_i, j, q_j]`` but for a constant.

    Args:
        space: of the estimate.
        slope: (n, m).
        matrix: (n, m, n, m), symmetric; None for none.
        method: name.
        forwards: cost.
    """
    n, _ = space.nbytes.shape
    linear = slope - slope[:, :1]
    if matrix is None:
        return SensitivityEstimate(space, linear, method=method, forwards=forwards)
    # Everything is measured from choice 0: pairs from both of its sides, and what the others' choice 0 adds to one.
    at_zero = matrix[:, :, :, 0].sum(axis=2)
    own = np.arange(n)
    alone = matrix[own[:, None], np.arange(slope.shape[1]), own[:, None], np.arange(slope.shape[1])]
    others = at_zero - matrix[own, :, own, 0]
    linear = linear + 0.5 * (alone - alone[:, :1]) + others - others[:, :1]
    pairs = matrix - matrix[:, :1] - matrix[:, :, :, :1] + matrix[:, :1, :, :1]
    pairs[own, :, own] = 0.0
    return SensitivityEstimate(space, linear, 0.5 * (pairs + pairs.transpose(2, 3, 0, 1)), method=method,
                               forwards=forwards)
