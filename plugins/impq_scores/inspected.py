"""Estimators that rank layers by importance, from activations, weights or positions, without measuring a loss.

An importance says nothing about widths. The cost of choice k is therefore the importance times the relative distortion
``(4^-b_k - 4^-b_0) / (4^-b_last - 4^-b_0)``: the squared error of uniform quantization at b bits, 0 at the widest and 1
at the narrowest width. With two widths and layers of equal size this is the ranking of the papers: the most important
layers keep the wide choice until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Inspector, Probe
from impq_core.references import depths
from impq_core.space import FloatArray, SearchSpace
from impq_core.types import SensitivityEstimate
from impq_core.workload import Workload


def from_importance(space: SearchSpace, importance: FloatArray, method: str,
                    forwards: float = 0.0) -> SensitivityEstimate:
    """An estimate without unit from importances (n,), shifted and scaled to costs from 0.001 to 1.001."""
    spread = float(importance.max() - importance.min()) or 1.0
    cost = (importance - importance.min()) / spread + 1e-3
    return SensitivityEstimate(space, cost[:, None] * space.rounding_errors, method=method, forwards=forwards,
                               is_loss=False)


def of_blocks(space: SearchSpace, scores: Mapping[int, float]) -> FloatArray:
    """Scores (n,) of layers from those of blocks by number. Layers below block level share the score of their block;
    the embedding has that of the first block, and the head that of the last."""
    return np.array([scores[min(max(layer.block, min(scores)), max(scores))] for layer in space.layers])


class Random(Inspector):
    """Importance drawn uniformly at random: the baseline for every other estimator."""

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """Nothing is measured."""
        return Workload.inspection(space)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """Costs no forward and reads neither weights nor text."""
        return from_importance(probe.space, rng.random(len(probe.space)), "random")


class FirstLast(Inspector):
    """The first and last blocks are the most important: importance falls with the distance to the nearer end."""

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """Nothing is measured."""
        return Workload.inspection(space)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """Costs no forward and reads neither weights nor text."""
        depth = depths(probe.space).astype(np.float64)
        return from_importance(probe.space, -depth, "first-last")


@dataclass(frozen=True)
class ZScoreOptions:
    """Options of the z-score estimator.

    Args:
        direction: ``fewer``: layers with fewer outlying weights are more important (the original paper); ``more``: the
            opposite (the text of CoopQ).
    """

    direction: str = "fewer"

    def __post_init__(self) -> None:
        if self.direction not in ("fewer", "more"):
            raise ValueError(f"direction must be fewer or more, not '{self.direction}'")


class ZScore(Inspector):
    """ZD (arXiv 2406.17415): share of a layer's weights with ``(w - mean) / std > 1``, one-sided, over all its weights
    together. Data-free."""

    Options = ZScoreOptions

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """Nothing is measured."""
        return Workload.inspection(space)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """Reads the weights; costs no forward."""
        import torch

        shares = []
        for layer in probe.space.layers:
            weights = torch.cat([probe.weight(linear).flatten() for linear in layer.linears])
            shares.append(float(((weights - weights.mean()) / weights.std() > 1).float().mean()))
        sign = -1.0 if self.options.direction == "fewer" else 1.0
        return from_importance(probe.space, sign * np.array(shares), f"zscore({self.options.direction})")


class Lim(Inspector):
    """LIM (arXiv 2406.17415): ``-cos(block input, block output)``, each window flattened, averaged over windows.

    A block that changes the direction of its input more is more important. Layers below block level share the score of
    their block.
    """

    needs = frozenset({"activations"})

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """One pass over the hidden states."""
        return Workload.inspection(space, states=1)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """One forward of the blocks."""
        import torch

        scores = {}
        for index, inputs, outputs in probe.block_states():
            cosines = [torch.cosine_similarity(a.flatten(1).float(), b.flatten(1).float(), dim=1)
                       for a, b in zip(inputs, outputs, strict=True)]
            scores[index] = -float(torch.cat(cosines).mean())
        importance = of_blocks(probe.space, scores)
        return from_importance(probe.space, importance, "lim", probe.forwards)


class Activation(Inspector):
    """CoopQ's activation baseline: ``s_i = 100 min_j ||H_j||_F / ||H_i||_F`` with H the block's output over the
    calibration windows. Layers below block level share the score of their block."""

    needs = frozenset({"activations"})

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """One pass over the hidden states."""
        return Workload.inspection(space, states=1)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """One forward of the blocks."""
        norms = {index: float(sum(float(b.float().square().sum()) for b in outputs)) ** 0.5
                 for index, _, outputs in probe.block_states()}
        bad = [index for index, norm in norms.items() if not np.isfinite(norm)]
        if bad:
            raise ImpqError(f"the output of block {bad[0]} is not finite: try --dtype float32")
        smallest = min(norms.values())
        importance = 100 * smallest / of_blocks(probe.space, norms)
        return from_importance(probe.space, importance, "activation", probe.forwards)
