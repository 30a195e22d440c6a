"""LieQ: how compact what a block reads is, against a randomly initialised twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Inspector, Probe
from impq_core.space import LinearSpec, SearchSpace
from impq_core.types import SensitivityEstimate
from impq_core.workload import Workload
from impq_scores.inspected import from_importance, of_blocks

if TYPE_CHECKING:
    import torch


class LieQ(Inspector):
    """LieQ, second version (arXiv 2508.03332): the representational compactness of a block, ``s = mean over q, k, v of
    RC(trained) - RC(randomly initialised twin)``.

    ``RC(Z) = exp(-entropy(p))`` with p the eigenvalues of the covariance of Z, scaled to sum 1: one over the effective
    rank. Z are the outputs of the linears that read the block's input behind its norm (q, k and v), their rows centred
    over features and scaled to unit length. A block that is more compact than its twin is more important. Layers below
    block level share the score of their block.

    The paper reads one sentence; here it is the calibration text, because a covariance of few tokens has their rank.
    The twin has normal weights of standard deviation ``columns^-1/2`` in all linears of blocks, drawn from the run's
    seed; its norms and embedding are the model's.
    """

    needs = frozenset({"activations"})

    def workload(self, space: SearchSpace, sets: int) -> Workload:
        """Two passes over the hidden states."""
        return Workload.inspection(space, states=2)

    def inspect(self, probe: Probe, rng: np.random.Generator) -> SensitivityEstimate:
        """Two forwards of the blocks."""
        import torch

        seeds: dict[str, int] = {}

        def drawn(linear: LinearSpec) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seeds.setdefault(linear.name, int(rng.integers(2**63))))
            return torch.randn(linear.rows, linear.columns, generator=generator) / linear.columns**0.5

        trained, twin = _compactness(probe), _compactness(probe, drawn)
        scores = {block: trained[block] - twin[block] for block in trained}
        return from_importance(probe.space, of_blocks(probe.space, scores), "lieq", probe.forwards)


def _compactness(probe: Probe, weights: Callable[[LinearSpec], torch.Tensor] | None = None) -> dict[int, float]:
    """Mean RC by block, of the model or of one with other weights."""
    return {block: float(np.mean([1.0 / effective_rank(parts, probe) for parts in outputs.values()]))
            for block, outputs in probe.first_outputs(weights)}


def effective_rank(outputs: Sequence[torch.Tensor], probe: Probe) -> float:
    """``exp(entropy)`` of the eigenvalues of the covariance of a linear's outputs, their rows centred over features and
    of unit length.

    Args:
        outputs: parts (..., features).
        probe: charged with the products.

    Raises:
        ImpqError: an output is not finite.
    """
    import torch

    width = outputs[0].shape[-1]
    # Some devices have no float64: there the sum is kept on the host.
    covariance = torch.zeros(width, width, dtype=torch.float64,
                             device=outputs[0].device if outputs[0].device.type in ("cpu", "cuda") else "cpu")
    for part in outputs:
        rows = part.reshape(-1, width).float()
        rows = torch.nn.functional.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)
        with probe.charging():
            covariance += (rows.T @ rows).to(covariance.device)
    if not torch.isfinite(covariance).all():
        raise ImpqError("estimator lieq: an output in a block is not finite: try --dtype float32")
    values = torch.linalg.eigvalsh(covariance).clamp_min(0.0)
    shares = values / values.sum().clamp_min(1e-30)
    return float(torch.special.entr(shares).sum().exp())
