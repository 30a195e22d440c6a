"""Estimators from gradients in the outputs of linears, and from gradients at quantized weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impq_core.errors import UsageError
from impq_core.interfaces import Inspector, Probe
from impq_core.space import FloatArray, SearchSpace
from impq_core.types import SensitivityEstimate
from impq_core.workload import Workload
from impq_scores.gradients import over_windows


def blocks_only(space: SearchSpace, name: str) -> None:
    """Raises UsageError if the embedding plays, for an estimator that knows linears of blocks only."""
    if any(layer.block < 0 for layer in space.layers):
        raise UsageError(f"estimator {name} knows no cost of embedding and head: leave out --quantize-embeddings, or "
                         "take --estimator guided-output")


@dataclass(frozen=True)
class GuidedOutputOptions:
    """Options of the guided-output estimator.

    Args:
        form: ``token`` squares the change of each token's loss, ``(g_t . dW x_t)^2``; ``gram`` takes errors in
            the rows for independent, ``s_t |dW x_t|^2`` with s_t the mean square of the gradient over a group of rows.
        groups: for ``gram``: number of groups that the rows of a linear are split into.
    """

    form: str = "token"
    groups: int = 4

    def __post_init__(self) -> None:
        if self.form not in ("token", "gram"):
            raise ValueError(f"form must be token or gram, not '{self.form}'")
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, not {self.groups}")


class GuidedOutput(Inspector):
    """Output errors of each linear, weighted by the gradient of the loss in its output: the score of GEMQ (arXiv
    2605.23078), ``sum_t,f g_tf^2 (dy_tf)^2``, for any linear, in nats per token to second order. With ``form=token``,
    the default, this is the per-token empirical Fisher information of each linear's quantization error (the *token
    Fisher*).

    With x_t the linear's input, g_t the gradient of the token-summed loss in its output, both of the unquantized model,
    and dW the quantization error of a choice, its cost is ``1/2T sum_t (g_t . dW x_t)^2``: the diagonal over tokens of
    the empirical Fisher matrix in place of the Hessian. With ``form=gram`` it is ``1/2 sum_g tr(dW_g H_g dW_g')`` with
    the matrices of GuidedQuant (arXiv 2505.07004), ``H_g = sum_t s_tg x_t x_t' / T``. Costs of a layer's linears add
    up. The cost of a choice is relative to the reference choice's.
    """

    Options = GuidedOutputOptions
    needs = frozenset({"gradients"})

    def check_space(self, space: SearchSpace) -> None:
        """With ``form=gram``, only linears of blocks may play."""
        if self.options.form == "gram":
            blocks_only(space, "guided-output with form=gram")

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """One reading of squares, or of the curvature in each group."""
        if self.options.form == "token":
            return Workload.inspection(space, squares=1)
        traces = sum(2 * linear.rows * linear.columns**2 for layer in space.layers for linear in layer.linears)
        return Workload.inspection(space, curvatures=self.options.groups, products=len(space.choices) * traces)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """One backward a window: about three forwards, and the products. With ``form=token`` it has standard errors
        over windows."""
        if self.options.form == "token":
            return over_windows(probe, probe.token_squares() / 2, "guided-output")
        costs = self._by_gram(probe)
        return SensitivityEstimate(probe.space, costs - costs[:, :1], forwards=probe.forwards,
                                   method=f"guided-output(gram, {self.options.groups} groups)")

    def _by_gram(self, probe: Probe) -> FloatArray:
        """``1/2 sum_g tr(dW_g H_g dW_g')`` (n, m)."""
        costs = np.zeros(probe.space.nbytes.shape)
        layers = {linear: i for i, layer in enumerate(probe.space.layers) for linear in layer.linears}
        for linear, gram in probe.output_curvature(self.options.groups):
            weight = probe.weight(linear)
            for k, choice in enumerate(probe.space.choices):
                parts = (probe.variant(linear, choice) - weight).tensor_split(len(gram))
                for part, matrix in zip(parts, gram, strict=True):
                    with probe.charging():
                        costs[layers[linear], k] += 0.5 * float(((part @ matrix) * part).sum())
        return costs


class AutoScheme(Inspector):
    """AutoScheme of SignRoundV2 (arXiv 2512.04746): ``s_{i,b} = sum |g (W - Q_b(W))|`` over the weights of layer i,
    with the gradient of each window taken where the whole model is quantized at width b, averaged over windows.

    The terms cannot cancel, unlike those of llm-mq. The cost of a choice is its score minus the reference's, at least
    0. It ranks choices and is no loss.
    """

    needs = frozenset({"gradients"})

    def check_space(self, space: SearchSpace) -> None:
        """Only linears of blocks may play."""
        blocks_only(space, "autoscheme")

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """A reading of slopes for each width."""
        return Workload.inspection(space, slopes=len(space.choices))

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """One backward a window and width: about four forwards each."""
        scores = np.stack([probe.absolute_slopes(at).mean(axis=0) for at in np.eye(len(probe.space.choices))], axis=1)
        linear = np.maximum(scores - scores[:, :1], 0.0)
        return SensitivityEstimate(probe.space, linear, method="autoscheme", forwards=probe.forwards, is_loss=False)
