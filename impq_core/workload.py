"""The work that an estimator asks of a model, known before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from impq_core.space import FloatArray, SearchSpace


@dataclass(frozen=True, eq=False)
class Workload:
    """Numbers of losses, gradients and activations that an estimator is expected to read.

    Args:
        losses: float64 (blocks,). Entry b is the number of losses whose evaluation begins at block b: the pick differs
            from the pick measured before first in that block, so the blocks in front of it are not run again. A loss
            that shares no block with the one before is counted at block 0, and so is one that differs in the embedding;
            one that differs in the head alone, behind the last block.
        sets: number of sets of calibration windows that the losses are on.
        slopes: calls of ``Probe.slopes`` and ``Probe.absolute_slopes``.
        traces: calls of ``Probe.hessian_traces``.
        states: passes over ``Probe.block_states``.
        squares: calls of ``Probe.token_squares``.
        curvatures: groups of ``Probe.output_curvature``; 0 if it is not called.
        products: FLOPs of the estimator's own matrix products that are in ``Probe.charging``.
    """

    losses: FloatArray
    sets: int = 0
    slopes: int = 0
    traces: int = 0
    states: int = 0
    squares: int = 0
    curvatures: int = 0
    products: int = 0

    @property
    def passes(self) -> int:
        """Readings of gradients that a probe keeps in its log: slopes, squares and traces."""
        return self.slopes + self.traces + self.squares

    @property
    def backwards(self) -> bool:
        """Whether there is a backward pass."""
        return bool(self.slopes or self.traces or self.squares or self.curvatures)

    @classmethod
    def inspection(cls, space: SearchSpace, **readings: int) -> Workload:
        """The work of an estimator that measures no loss.

        Args:
            space: the search space.
            readings: the fields from ``slopes`` on.
        """
        return cls(losses_by_block(space, [0.0] * len(space)), **readings)


def losses_by_block(space: SearchSpace, moves: Sequence[float] | FloatArray, whole: float = 0.0) -> FloatArray:
    """Losses (blocks,) by the block that their evaluation begins at.

    Args:
        space: the search space.
        moves: (n,) number of losses that differ from the loss before in one layer, by layer.
        whole: number of losses that share no block with the loss before.
    """
    blocks = [max(0, layer.block) for layer in space.layers]
    count = 1 + max(layer.block for layer in space.everyone)
    losses: FloatArray = np.bincount(blocks, np.asarray(moves, np.float64), count).astype(np.float64)
    losses[0] += whole
    return losses
