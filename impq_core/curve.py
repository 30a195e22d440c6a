"""The curve of a model: held-out loss of plans against their size, beside the line of uniform models; its knee, and the
smallest plan within a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from impq_core.results import Evaluation, Row
from impq_core.space import FloatArray
from impq_core.target import Border, Target, Tried, border_of
from impq_core.window_losses import Difference

FORMAT = "impq-curve/1"

KNEE = ("the measured plan whose loss lies furthest below the straight line between the smallest and the largest "
        "measured plan")
"""Definition of the knee: Kneedle without smoothing (Satopaa, Albrecht, Irwin, Raghavan, Finding a 'Kneedle' in a
Haystack, ICDCSW 2011). Which point it is does not depend on the units of the axes."""


@dataclass(frozen=True, eq=False)
class Point:
    """A measured plan.

    Args:
        run: its run folder.
        budget: its budget as it was given.
        budget_bytes: the budget, in bytes of quantized weights.
        file_bytes: the most bytes of the file of an export; None if the budget does not bound it.
        evaluation: the plan and its references on held-out text.
    """

    run: Path
    budget: str
    budget_bytes: int
    file_bytes: int | None
    evaluation: Evaluation

    @property
    def row(self) -> Row:
        """The plan's row of the evaluation."""
        return self.evaluation.rows[0]

    @property
    def nbytes(self) -> int:
        """Stored bytes of the quantized weights."""
        assert self.row.nbytes is not None
        return self.row.nbytes

    @property
    def excess(self) -> Difference:
        """NLL minus that of the unquantized model, paired over windows."""
        return self.row.minus(self.evaluation.row("unquantized"))

    @property
    def divergence(self) -> Difference:
        """KL divergence from the unquantized model."""
        return self.evaluation.plan.divergence

    @property
    def line(self) -> Row | None:
        """The line between the neighbouring uniform models at the plan's bytes; None without uniform models."""
        rows = {row.name: row for row in self.evaluation.rows if row.kind == "line"}
        return rows.get("line of uniforms", rows.get("line low-high"))

    @property
    def minus_line(self) -> Difference | None:
        """NLL minus that of the line, paired over windows: below zero if the plan is better."""
        return self.row.minus(self.line) if self.line else None


@dataclass(frozen=True)
class Knee:
    """Where a curve bends.

    Args:
        point: the plan at the knee, see ``KNEE``.
        depth: the straight line's NLL minus the plan's, paired over windows.
    """

    point: Point
    depth: Difference


@dataclass(frozen=True, eq=False)
class Curve:
    """Plans for several budgets from one estimate.

    Args:
        parts: names of the parts that made it, by slot.
        points: at least one, the smallest first.
    """

    parts: Mapping[str, str]
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        """Names of the parts."""
        return " ".join(self.parts.values())

    @property
    def text(self) -> str:
        """Description of the held-out text."""
        return self.points[0].evaluation.text

    @property
    def tokens(self) -> int:
        """Scored tokens of the held-out text."""
        return self.points[0].evaluation.tokens

    @property
    def windows(self) -> int:
        """Number of windows of the held-out text."""
        return len(self.points[0].row.window_nll)

    @property
    def sequential(self) -> bool:
        """Whether plans and references were quantized in sequence, as an export is."""
        return self.points[0].evaluation.sequential

    @property
    def unquantized(self) -> Row:
        """The unquantized model."""
        return self.points[0].evaluation.row("unquantized")

    @property
    def uniform(self) -> tuple[Row, ...]:
        """Uniform models, the smallest first."""
        rows = [row for row in self.points[0].evaluation.rows if row.kind == "uniform"]
        return tuple(sorted(rows, key=lambda row: row.nbytes or 0))

    @cached_property
    def knee(self) -> Knee | None:
        """The knee; None with fewer than three sizes, or if no plan lies more than two standard errors below the
        straight line."""
        best: dict[int, Point] = {}
        for point in self.points:
            if math.isfinite(point.row.nll) and not (
                    point.nbytes in best and best[point.nbytes].row.nll <= point.row.nll):
                best[point.nbytes] = point
        points = [best[size] for size in sorted(best)]
        if len(points) < 3:
            return None
        chord = _between(points[0], points[-1], [point.nbytes for point in points])
        knees = [Knee(point, Row("chord", line).minus(point.row))
                 for point, line in zip(points, chord, strict=True)][1:-1]
        knee = max(knees, key=lambda one: one.depth.mean)
        return knee if knee.depth.mean > 0 and knee.depth.significant else None

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Plain data for JSON; runs are paths from ``folder`` if they are below it."""
        knee = self.knee
        return {"parts": dict(self.parts), "points": [_point_data(point, folder) for point in self.points],
                "uniform": [{"name": row.name, **_row_data(row, self.unquantized)} for row in self.uniform],
                "knee": knee and {"definition": KNEE, "run": _relative(knee.point.run, folder),
                                  "bytes": knee.point.nbytes, "depth": _number(knee.depth.mean),
                                  "depth_stderr": _number(knee.depth.stderr)}}


@dataclass(frozen=True, eq=False)
class Outcome:
    """The smallest measured plan of a curve within a target.

    Args:
        target: the target.
        curve: the measured plans.
    """

    target: Target
    curve: Curve

    @cached_property
    def _tried(self) -> dict[Tried, Point]:
        return {Tried(point.budget_bytes, point.nbytes, self.loss(point).mean): point for point in self.curve.points}

    @cached_property
    def _border(self) -> Border:
        return border_of(self.target.limit, self._tried)

    @property
    def tried(self) -> list[Tried]:
        """The plans as the search sees them."""
        return list(self._tried)

    @property
    def within(self) -> Point | None:
        """The smallest plan within the target; None if every plan misses it."""
        return self._tried[self._border.within] if self._border.within else None

    @property
    def outside(self) -> Point | None:
        """The plan with the next smaller budget, which misses the target; None if there is none."""
        return self._tried[self._border.outside] if self._border.outside else None

    @property
    def larger_outside(self) -> tuple[Point, ...]:
        """Larger plans than ``within`` that miss the target."""
        return tuple(self._tried[one] for one in self._border.larger_outside)

    def loss(self, point: Point) -> Difference:
        """The loss of a plan that the target bounds."""
        return self.target.loss(point.row, point.evaluation.row("unquantized"))

    def confidence(self, point: Point) -> float:
        """Probability that a plan is within the target on all text like the held-out one; NaN if unknown."""
        return self.target.confidence(self.loss(point), self.curve.windows)

    @property
    def uniform_within(self) -> Row | None:
        """The smallest uniform model within the target that is smaller than ``within``; None if there is none."""
        size = math.inf if self.within is None else self.within.nbytes
        return next((row for row in self.curve.uniform if (row.nbytes or 0) < size
                     and self.target.met_by(self.target.loss(row, self.curve.unquantized))), None)

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Plain data for JSON."""
        def side(point: Point | None) -> dict[str, Any] | None:
            if point is None:
                return None
            return {"run": _relative(point.run, folder), "bytes": point.nbytes,
                    "loss": _number(self.loss(point).mean), "loss_stderr": _number(self.loss(point).stderr),
                    "confidence": _number(self.confidence(point))}
        uniform = self.uniform_within
        return {"target": str(self.target), "measure": self.target.measure, "limit": self.target.limit,
                "within": side(self.within), "outside": side(self.outside),
                "larger_outside": [side(point) for point in self.larger_outside],
                "uniform_within": uniform and uniform.name}


def curves_data(model: str, curves: tuple[Curve, ...], answer: Outcome | None, folder: Path) -> dict[str, Any]:
    """The content of ``curve.json``: curves of one model on one text, and the answer to a target if there is one."""
    first = curves[0]
    return {"format": FORMAT, "model": model, "text": first.text, "tokens": first.tokens, "windows": first.windows,
            "sequential": first.sequential, "unquantized_nll": _number(first.unquantized.nll),
            "curves": [curve.to_dict(folder) for curve in curves], "target": answer and answer.to_dict(folder)}


def _between(first: Point, last: Point, sizes: list[int]) -> list[FloatArray]:
    """NLL of each window on the straight line between two plans, at each size."""
    low, high = first.row.window_nll, last.row.window_nll
    return [low + (size - first.nbytes) / (last.nbytes - first.nbytes) * (high - low) for size in sizes]


def _point_data(point: Point, folder: Path) -> dict[str, Any]:
    line, minus = point.line, point.minus_line
    return {"run": _relative(point.run, folder), "budget": point.budget, "budget_bytes": point.budget_bytes,
            "file_bytes": point.file_bytes, **_row_data(point.row, point.evaluation.row("unquantized")),
            "line_excess": line and _number(line.minus(point.evaluation.row("unquantized")).mean),
            "minus_line": minus and _number(minus.mean), "minus_line_stderr": minus and _number(minus.stderr)}


def _row_data(row: Row, unquantized: Row) -> dict[str, Any]:
    assert row.score is not None
    excess = row.minus(unquantized)
    numbers = {"bits_nominal": row.bits_nominal, "bits_stored": row.bits_stored, "nll": row.nll,
               "excess": excess.mean, "excess_stderr": excess.stderr, "kl": row.score.kl,
               "kl_stderr": row.score.divergence.stderr, "top1_agreement": row.score.top1}
    return {"bytes": row.nbytes, **{key: _number(value) for key, value in numbers.items()}}


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _relative(run: Path, folder: Path) -> str:
    return str(run.relative_to(folder)) if run.is_relative_to(folder) else str(run)
