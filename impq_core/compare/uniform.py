"""The line between uniform models: what a plan of a size has to beat, and how large a uniform model of its loss is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from impq_core.results import Evaluation, Row


@dataclass(frozen=True)
class EqualLoss:
    """The size of a uniform model with a plan's loss.

    Args:
        nbytes: its stored bytes of the quantizable weights.
        stderr: standard error of ``nbytes``, from losses paired over windows; NaN if unknown.
        bits: its nominal average width, bits per weight.
        plan_bytes: the plan's bytes.
        bound: ``above`` if every uniform model has a higher loss than the plan, so that ``nbytes``, of the largest, is
            too small; ``below`` if every one has a lower loss, so that ``nbytes``, of the smallest, is too large; else
            empty.
    """

    nbytes: float
    stderr: float
    bits: float
    plan_bytes: int
    bound: str = ""

    @property
    def saved(self) -> float:
        """Share of ``nbytes`` that the plan is smaller; below zero if the plan is larger."""
        return 1 - self.plan_bytes / self.nbytes

    @property
    def saved_stderr(self) -> float:
        """Standard error of ``saved``."""
        return self.plan_bytes / self.nbytes**2 * self.stderr


@dataclass(frozen=True, eq=False)
class UniformLine:
    """Straight lines between the uniform models of an evaluation, in bytes and loss: between the smallest and the
    largest, and between neighbours. At any size the one with the lower loss counts, as in ``Evaluation.with_lines``.

    Args:
        lines: the uniform models of each line, the smallest first.
    """

    lines: tuple[tuple[Row, ...], ...]

    @classmethod
    def of(cls, evaluation: Evaluation) -> UniformLine | None:
        """The line of an evaluation; None if fewer than two uniform models have a size and a finite loss."""
        points = sorted((row for row in evaluation.rows if row.kind == "uniform" and row.nbytes
                         and np.isfinite(row.window_nll).all()), key=lambda row: (row.nbytes or 0, row.nll))
        if len({row.nbytes for row in points}) < 2:
            return None
        return cls(((points[0], points[-1]), tuple(points)) if len(points) > 2 else (tuple(points),))

    @property
    def models(self) -> tuple[Row, ...]:
        """All uniform models, the smallest first."""
        return self.lines[-1]

    def at(self, nbytes: float) -> Row:
        """The line at a size; outside the sizes of the uniform models, the nearest of them."""
        found = []
        for models in self.lines:
            sizes = [row.nbytes or 0 for row in models]
            losses = np.stack([row.window_nll for row in models], axis=1)
            windows = np.array([np.interp(nbytes, sizes, window) for window in losses])
            found.append(replace(models[0], name="line", window_nll=windows, nbytes=round(nbytes), score=None))
        return min(found, key=lambda row: row.nll)

    def equal_loss(self, plan: Row) -> EqualLoss | None:
        """The smallest size at which a line is down to the plan's loss; None if the plan's loss is not finite.

        The standard error is, to first order, that of the line's loss there minus the plan's, over the line's slope.
        """
        assert plan.nbytes is not None
        if not np.isfinite(plan.window_nll).all():
            return None
        return min((_crossing(models, plan, plan.nbytes) for models in self.lines), key=lambda found: found.nbytes)


def _crossing(models: Sequence[Row], plan: Row, plan_bytes: int) -> EqualLoss:
    small, large = models[0], models[-1]
    if small.nll <= plan.nll:
        return EqualLoss(small.nbytes or 0, math.nan, small.bits_nominal or math.nan, plan_bytes, "below")
    for left, right in pairwise(models):
        if right.nll > plan.nll:
            continue
        share = (left.nll - plan.nll) / (left.nll - right.nll)
        ends = np.array([left.nbytes, right.nbytes], float), np.array([left.bits_nominal, right.bits_nominal], float)
        nbytes, bits = (float(low + share * (high - low)) for low, high in ends)
        between = replace(left, window_nll=(1 - share) * left.window_nll + share * right.window_nll)
        slope = (left.nll - right.nll) / (ends[0][1] - ends[0][0]) if ends[0][1] > ends[0][0] else math.inf
        return EqualLoss(nbytes, between.minus(plan).stderr / slope, bits, plan_bytes)
    return EqualLoss(large.nbytes or 0, math.nan, large.bits_nominal or math.nan, plan_bytes, "above")
