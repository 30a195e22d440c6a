"""Data-free importances: from the shape of the weights alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Inspector, Probe
from impq_core.space import FloatArray, LayerSpec, LinearSpec, SearchSpace
from impq_core.types import SensitivityEstimate
from impq_core.workload import Workload
from impq_scores.inspected import from_importance

if TYPE_CHECKING:
    import torch

OUTLIER = 2.0
"""Standard deviations of a jump that doubles an importance."""

ENERGY = 0.99
"""Share of the squared singular values that counts."""

WRITERS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "down_proj", "fc2", "w2", "dense_4h_to_h")
"""Names of linears that write to the residual stream; all others read from it."""


def excess_kurtosis(values: torch.Tensor) -> torch.Tensor:
    """Excess kurtosis along the last dimension, 0 of a normal distribution and of equal values."""
    centred = values - values.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1)
    kurtosis: torch.Tensor = centred.pow(4).mean(dim=-1) / variance.square().clamp_min(1e-30) - 3.0
    return kurtosis.where(variance > 0, kurtosis.new_zeros(()))


def kind_of(layer: LayerSpec) -> str:
    """A layer's name without the number of its block: that of the same layer in other blocks."""
    return re.sub(rf"\b{layer.block}\b", "*", layer.name, count=1)


def with_jumps_doubled(space: SearchSpace, scores: FloatArray) -> FloatArray:
    """Scores (n,), doubled where the rise over the layer of the same kind in the block before is more than ``OUTLIER``
    standard deviations above the mean change of all layers of the kind."""
    found = scores.copy()
    kinds: dict[str, list[int]] = {}
    for i in sorted(range(len(space)), key=lambda i: space.layers[i].block):
        kinds.setdefault(kind_of(space.layers[i]), []).append(i)
    for members in kinds.values():
        jumps = np.diff(scores[members])
        if len(jumps) > 1:
            outlying = jumps > jumps.mean() + OUTLIER * jumps.std()
            found[np.array(members[1:])[outlying]] *= 2.0
    return found


class Kurtosis(Inspector):
    """KurtBoost (arXiv 2503.06518): the kurtosis of a layer's weights, mean over its linears, doubled where its jump
    over the block before is a 2-sigma outlier: ``mean_l E(w - mean)^4 / std^4``.

    Heavier tails are taken to be harder to quantize, so they are more important. Data-free.
    """

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """Nothing is measured."""
        return Workload.inspection(space)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """Reads the weights; costs no forward."""
        scores = np.array([np.mean([3.0 + float(excess_kurtosis(probe.weight(linear).flatten()))
                                    for linear in layer.linears]) for layer in probe.space.layers])
        return from_importance(probe.space, with_jumps_doubled(probe.space, scores), "kurtosis")


class Nsds(Inspector):
    """NSDS (arXiv 2603.17354): how heavy the tails of the weights are, and how much spectral energy lies in directions
    with heavy tails. Data-free.

    For each linear, with singular values S up to 99 % of their energy: ``NV`` is the excess kurtosis of its weights,
    and ``SE = sum_r S_r a_r / rank`` with the effective rank ``exp(entropy of S / sum S)`` and ``a_r = log(1 + max(0,
    kurtosis))`` of the singular vector on the side of the features: the right one of linears that read the residual
    stream, the left one of those that write to it. Both are scaled over all linears of a kind by ``sigmoid((x - median)
    / MAD)``, and those of a layer are joined by ``1 - exp(mean log(1 - s))``.

    The paper takes query and key, and value and output, as one product for each head, and projects the vectors of
    writers on the head's columns, which leaves them as they are if the head has full rank. Here every linear is its
    own, because the products need the numbers of heads.
    """

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """Nothing is measured."""
        return Workload.inspection(space)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """Reads the weights and decomposes each; costs no forward.

        Raises:
            ImpqError: the decomposition of a weight failed.
        """
        raw = {linear: _diagnostics(linear, probe.weight(linear))
               for layer in probe.space.layers for linear in layer.linears}
        scaled = _scaled(probe.space.layers, raw)
        importance = np.array([1.0 - np.exp(np.mean([np.log1p(-scaled[linear]) for linear in layer.linears]))
                               for layer in probe.space.layers])
        return from_importance(probe.space, importance, "nsds")


def _diagnostics(linear: LinearSpec, weight: torch.Tensor) -> FloatArray:
    """NV and SE of a linear."""
    import torch

    try:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise ImpqError(f"estimator nsds: the singular values of {linear.name} cannot be computed") from error
    energy = values.square().cumsum(0)
    count = 1 + int((energy < ENERGY * energy[-1]).sum())
    values = values[:count]
    vectors = left.T[:count] if linear.name.rpartition(".")[2] in WRITERS else right[:count]
    shares = (values / values.sum().clamp_min(1e-30)).clamp_min(1e-30)
    rank = (-(shares * shares.log()).sum()).exp()
    tails = excess_kurtosis(vectors).clamp_min(0.0).log1p()
    return np.array([float(excess_kurtosis(weight.flatten())), float((values * tails).sum() / rank)])


def _scaled(layers: Sequence[LayerSpec], raw: Mapping[LinearSpec, FloatArray]) -> dict[LinearSpec, FloatArray]:
    """The diagnostics of each linear, from 0 to below 1, relative to those of its kind in other blocks."""
    kinds: dict[str, list[LinearSpec]] = {}
    for layer in layers:
        for linear in layer.linears:
            kinds.setdefault(linear.name.rpartition(".")[2], []).append(linear)
    found = {}
    for members in kinds.values():
        values = np.stack([raw[linear] for linear in members])  # (members, 2)
        centred = values - np.median(values, axis=0)
        spread = 1.4826 * np.median(np.abs(centred), axis=0)
        scores = 1.0 / (1.0 + np.exp(-np.clip(centred / np.where(spread > 0, spread, 1.0), -30.0, 30.0)))
        found.update(zip(members, np.minimum(scores, 1.0 - 1e-12), strict=True))
    return found
