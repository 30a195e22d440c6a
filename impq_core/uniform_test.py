"""A plan against the uniform model of its budget, on text that it was not made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from impq_core.space import FloatArray, IntArray
from impq_core.statistics import confidence_below, mean, standard_error
from impq_core.types import Plan

ONE_ERROR = 0.8413447460685429
"""Probability that a normal value is less than one standard deviation above its mean."""


@dataclass(frozen=True)
class UniformTest:
    """The loss of an estimated plan minus that of the largest uniform model within its budget and limits, on
    calibration windows that neither game nor gradients read.

    Args:
        uniform: name of the choice of the uniform model.
        uniform_bytes, plan_bytes: stored bytes of both.
        minus_uniform: the plan's loss minus the uniform model's, nats per token; minus infinity if only the plan's is
            finite, NaN or infinity if the plan's is not.
        stderr: standard error of ``minus_uniform``, paired over windows; NaN if unknown.
        value: the loss: ``nll``, or ``kl`` to the unquantized model.
        tokens: scored tokens.
        windows: of these tokens; 0 in files before 0.9, for a number so large that it does not matter.
    """

    uniform: str
    uniform_bytes: int
    plan_bytes: int
    minus_uniform: float
    stderr: float
    value: str
    tokens: int
    windows: int

    @property
    def replaces(self) -> bool:
        """Whether the uniform model is taken for the plan: unless the plan's loss is smaller with a confidence of 84 %,
        which is that of one standard error of many windows (or smaller by anything, if the error is unknown)."""
        sure = confidence_below(0.0, self.minus_uniform, self.stderr, self.windows or math.inf)
        return not self.minus_uniform < 0 or sure < ONE_ERROR

    @classmethod
    def of(cls, plan: Plan, uniform: IntArray, losses: tuple[FloatArray, FloatArray], weights: FloatArray | None,
           value: str, tokens: int) -> UniformTest:
        """The test of a plan.

        Args:
            plan: the estimated plan.
            uniform: pick (n,) of the uniform model.
            losses: of the plan and of the uniform model: (windows,) each, nats per token.
            weights: (windows,), of each window in the loss; None if all count alike.
            value: ``nll`` or ``kl``.
            tokens: scored tokens.
        """
        of_plan, of_uniform = losses
        found = (-math.inf, math.nan)
        if not np.isfinite(of_plan).all() or np.isfinite(of_uniform).all():
            with np.errstate(invalid="ignore"):
                apart = of_plan - of_uniform
            found = mean(apart, weights), standard_error(apart, weights)
        return cls(str(plan.space.choices[uniform[0]]), plan.space.bytes_of(uniform), plan.nbytes, *found, value,
                   tokens, len(of_plan))

    def describe(self) -> str:
        """The test in a line."""
        error = "" if math.isnan(self.stderr) else f" ± {self.stderr:.4f}"
        found = (f"{self.minus_uniform:+.4f}{error} nats per token ({self.value}) on {self.tokens} held-back tokens of "
                 "the calibration text")
        if self.replaces:
            return (f"uniform {self.uniform} is the plan: the estimated one does not beat it with a confidence of "
                    f"84 %, {found}; --no-fallback keeps the estimated one")
        return f"estimated plan minus uniform {self.uniform}: {found}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a number that is not finite is null."""
        return {"uniform": self.uniform, "uniform_bytes": self.uniform_bytes, "plan_bytes": self.plan_bytes,
                "minus_uniform": _finite(self.minus_uniform), "stderr": _finite(self.stderr), "value": self.value,
                "tokens": self.tokens, "windows": self.windows, "replaces": self.replaces}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UniformTest:
        """Read the data of ``to_dict``; raises KeyError, TypeError or ValueError if it is something else."""
        missing = math.nan if data["replaces"] else -math.inf
        return cls(str(data["uniform"]), int(data["uniform_bytes"]), int(data["plan_bytes"]),
                   missing if data["minus_uniform"] is None else float(data["minus_uniform"]),
                   math.nan if data["stderr"] is None else float(data["stderr"]), str(data["value"]),
                   int(data["tokens"]), int(data.get("windows", 0)))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def uniform_within(plan: Plan) -> IntArray | None:
    """The pick (n,) of the largest uniform model within a plan's budget and limits; None if there is none, or if it is
    the plan."""
    space = plan.space
    picks = [pick for k in range(len(space.choices)) if plan.admits(pick := space.uniform(k))]
    largest = max(picks, key=space.bytes_of, default=None)
    return None if largest is None or (largest == plan.pick).all() else largest
