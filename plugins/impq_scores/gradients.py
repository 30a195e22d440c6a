"""Estimators from gradients and Hessians of the loss: a few forwards for any number of layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impq_core.interfaces import Inspector, Probe
from impq_core.space import FloatArray, SearchSpace
from impq_core.statistics import standard_error
from impq_core.types import SensitivityEstimate
from impq_core.workload import Workload


class LlmMq(Inspector):
    """LLM-MQ (NeurIPS 2023 ENLSP): ``s_{i,b} = |g_i . (W_i - Q_b(W_i))|``, first order, at the unquantized weights.
    The inner product can cancel, so its absolute value is taken per window and averaged over windows.

    The cost of a choice is its score minus the reference's, at least 0. It ranks choices and is no loss.
    """

    needs = frozenset({"gradients"})

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """One reading of slopes."""
        return Workload.inspection(space, slopes=1)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """One backward a window: about four forwards in all, whatever the menu."""
        scores = np.abs(probe.slopes()).mean(axis=0)
        linear = np.maximum(scores - scores[:, :1], 0.0)
        return SensitivityEstimate(probe.space, linear, method="llm-mq", forwards=probe.forwards, is_loss=False)


@dataclass(frozen=True)
class FisherOptions:
    """Options of the Fisher estimator.

    Args:
        at: where the gradients are taken, from 0 (all layers at the widest choice) to 1 (all at the narrowest); between
            two choices the weights are blended.
        curvature: weight of the second-order term. A weight of 1 is several times too large for a damaged model,
            because the empirical Fisher matrix counts its residuals as curvature.
    """

    at: float = 0.25
    curvature: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.at <= 1 or self.curvature < 0:
            raise ValueError("at must lie between 0 and 1, curvature must not be negative")


class Fisher(Inspector):
    """Second-order expansion of the loss around one point, from one backward pass a window.

    Let ``u[s, i, k]`` be the first-order change of window s's mean loss if layer i moves to choice k. The change of the
    loss is ``sum_i mean_s u + (T/2) Var_s(sum_i u)``: the variance over windows times the T tokens of a window replaces
    the Gauss-Newton (empirical Fisher) matrix, as if the gradients of different tokens were independent. The cross
    terms are covariances between layers, so they cost no more than the slopes.
    """

    Options = FisherOptions
    needs = frozenset({"gradients"})

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """One reading of slopes."""
        return Workload.inspection(space, slopes=1)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """One backward a window: about four forwards in all, whatever the menu."""
        space = probe.space
        slopes = probe.slopes(shares_at(space, self.options.at))
        windows, n, m = slopes.shape
        flat = slopes.reshape(windows, n * m)
        curvature = self.options.curvature * probe.window_tokens
        matrix = (curvature * np.cov(flat.T, bias=True)).reshape(n, m, n, m) if windows > 1 else None
        return quadratic(space, slopes.mean(axis=0), matrix, f"fisher(at={self.options.at:g})", probe.forwards)


@dataclass(frozen=True)
class TokenFisherOptions(FisherOptions):
    """Options of the token-fisher estimator.

    Args:
        at: where the loss is expanded, from 0 (all layers at the widest choice) to 1 (all at the narrowest); between
            two choices the weights are blended.
        curvature: weight of the second-order term.
    """

    curvature: float = 1.0


class TokenFisher(Inspector):
    """Second-order expansion of the loss around a slightly quantized model, with the empirical Fisher matrix of tokens.

    All layers are moved a little towards narrower widths, by blending weights. With x_t the input of a linear there,
    g_t the gradient of the token-summed loss in its output, and dW the change of its weight to a choice, the cost of
    the choice is ``1/T sum_t g_t . dW x_t + 1/2T sum_t (g_t . dW x_t)^2``, minus that of the widest choice; those of a
    layer's linears add up. The first term is what a choice costs among layers that are quantized too, which a score at
    the unquantized model does not see. With ``--value kl`` it is nothing else, because the divergence is flat at the
    unquantized model; with ``nll`` it also has the slope there, an accident of the text. The second term is the
    diagonal over tokens of the empirical Fisher matrix of the negative log-likelihood in place of the Hessian, which
    both losses share; ``guided-output`` is that term alone, at the unquantized model.
    """

    Options = TokenFisherOptions
    needs = frozenset({"gradients"})

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """A reading of slopes and one of squares."""
        return Workload.inspection(space, slopes=1, squares=1)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """Two backwards a window: about seven forwards, and the products. Standard errors are over windows."""
        at = shares_at(probe.space, self.options.at)
        costs = probe.slopes(at) + self.options.curvature / 2 * probe.token_squares(at)
        return over_windows(probe, costs, f"token-fisher(at={self.options.at:g})")


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
    """Aumann-Shapley values: the cost of a step is the integral of its slope along a path.

    On the path all layers move together from each width to the next, with linearly blended weights. The values of all
    layers add up to the loss of the all-narrowest model above the all-widest one, up to the error of the quadrature.
    """

    Options = AumannShapleyOptions
    needs = frozenset({"gradients"})

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """A reading of slopes for each node of each width step."""
        return Workload.inspection(space, slopes=self.options.nodes * (len(space.choices) - 1))

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """``nodes`` backwards a window and width step: about four forwards each. Standard errors are over windows."""
        space = probe.space
        nodes, weights = np.polynomial.legendre.leggauss(self.options.nodes)  # on [-1, 1]
        m = len(space.choices)
        costs: FloatArray = np.zeros((1, len(space), m))  # (windows, n, m)
        for step in range(m - 1):
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):  # on [0, 1]
                slopes = probe.slopes(shares_at(space, (step + node) / (m - 1)))
                taken = np.arange(m) > step
                costs = costs + weight * taken * (slopes[:, :, step + 1] - slopes[:, :, step])[:, :, None]
        return over_windows(probe, costs, f"aumann-shapley({self.options.nodes} nodes)")


@dataclass(frozen=True)
class HawqOptions:
    """Options of the HAWQ estimator.

    Args:
        samples: random vectors for the Hessian traces, about eight forwards each.
    """

    samples: int = 2

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")


class Hawq(Inspector):
    """HAWQ-V2 (arXiv 1911.03852): ``1/2 sum_l trace(H_l) / size_l ||Q_b(W_l) - W_l||^2`` over a layer's linears.

    This is the second-order term of the loss at the unquantized weights, with the average curvature of each linear in
    place of its Hessian. The traces are of the Hessian of the loss, not of a Gauss-Newton matrix, and can be negative:
    a negative trace counts as 0. The cost of a choice is its term minus the reference's, at least 0.
    """

    Options = HawqOptions
    needs = frozenset({"gradients"})

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """A draw of the traces for each sample."""
        return Workload.inspection(space, traces=self.options.samples)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """``samples`` draws of the traces: about eight forwards each."""
        space = probe.space
        draws = [probe.hessian_traces(rng) for _ in range(self.options.samples)]
        terms = np.zeros((len(draws), *space.nbytes.shape))  # (samples, n, m)
        linear = np.zeros(space.nbytes.shape)
        for i, layer in enumerate(space.layers):
            for spec in layer.linears:
                weight = probe.weight(spec)
                errors = np.array([float((probe.variant(spec, choice) - weight).square().sum())
                                   for choice in space.choices])  # (m,)
                traces = np.array([draw[spec] for draw in draws])  # (samples,)
                terms[:, i] += 0.5 * traces[:, None] / spec.parameters * (errors - errors[0])
                linear[i] += 0.5 * np.maximum(0.0, traces.mean()) / spec.parameters * errors  # a NaN stays one
        stderr = np.full(linear.shape, np.nan)
        if len(draws) > 1:
            stderr = terms.std(axis=0, ddof=1) / np.sqrt(len(draws))
        return SensitivityEstimate(space, np.maximum(linear - linear[:, :1], 0.0), stderr=stderr,
                                   method=f"hawq({len(draws)} samples)", forwards=probe.forwards)


def over_windows(probe: Probe, costs: FloatArray, method: str) -> SensitivityEstimate:
    """The estimate of costs (windows, n, m) of each window: their means, relative to choice 0, and the standard errors
    of these."""
    relative = costs - costs[:, :, :1]
    stderr = np.apply_along_axis(standard_error, 0, relative)
    return SensitivityEstimate(probe.space, relative.mean(axis=0), stderr=stderr, method=method,
                               forwards=probe.forwards)


def shares_at(space: SearchSpace, at: float) -> FloatArray:
    """Shares (m,) that blend the two choices on either side of ``at``, from all-widest (0) to all-narrowest (1)."""
    m = len(space.choices)
    shares = np.maximum(0.0, 1.0 - np.abs(at * (m - 1) - np.arange(m)))
    return shares


def quadratic(space: SearchSpace, slope: FloatArray, matrix: FloatArray | None, method: str,
              forwards: float) -> SensitivityEstimate:
    """The estimate of ``sum_i slope[i, q_i] + 1/2 sum_ij matrix[i, q_i, j, q_j]`` minus its value at choice 0.

    Args:
        space: the space of the estimate.
        slope: (n, m).
        matrix: (n, m, n, m), symmetric; None for an additive estimate.
        method: name of the method.
        forwards: cost in full-model forwards.
    """
    n, m = space.nbytes.shape
    linear = slope - slope[:, :1]
    if matrix is None:
        return SensitivityEstimate(space, linear, method=method, forwards=forwards)
    # All terms are relative to choice 0: a pair term loses its values with either layer at choice 0, and these become
    # part of the other layer's linear term.
    rows, widths = np.arange(n), np.arange(m)
    own = matrix[rows[:, None], widths, rows[:, None], widths]  # (n, m): a layer with itself
    others = matrix[:, :, :, 0].sum(axis=2) - matrix[rows, :, rows, 0]  # (n, m): with all other layers at choice 0
    linear = linear + 0.5 * (own - own[:, :1]) + others - others[:, :1]
    pairs = matrix - matrix[:, :1] - matrix[:, :, :, :1] + matrix[:, :1, :, :1]
    pairs[rows, :, rows] = 0.0
    return SensitivityEstimate(space, linear, 0.5 * (pairs + pairs.transpose(2, 3, 0, 1)), method=method,
                               forwards=forwards)
