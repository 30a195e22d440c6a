"""The surrogate that tells unseen losses best."""

from __future__ import annotations

from dataclasses import replace

from impq_core.errors import ImpqError
from impq_core.interfaces import Surrogate
from impq_core.types import Measurements, SensitivityEstimate
from impq_core.validation import Ordering, validate
from impq_surrogates.regression import Coverage, Regression
from impq_surrogates.shapley import Additive

CLEARLY = 2.0
"""Standard errors."""


class Auto(Surrogate):
    """``additive``, or of ``coverage`` and ``regression`` the one that puts fewer pairs of held-out measurements of one
    size in the wrong order, by more than ``CLEARLY`` standard errors over independent draws; with few draws nothing is
    clear. (With four orders of the real model ``regression`` made plans worse than ``additive`` by 0.04 to 0.06 nats,
    benchmarks/results/frontier.md.) What was found is in the estimate's method.

    Where ``additive`` cannot be fitted, as to orders cut to the sizes asked for, ``coverage`` is in its place, or else
    ``regression``. ``covariance`` is not among them: its objective is a score and forecasts no loss.
    """

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The chosen one's estimate; raises ImpqError where none can be fitted or validated."""
        candidates: dict[str, Surrogate] = {"additive": Additive(), "coverage": Coverage(), "regression": Regression()}
        found: dict[str, Ordering] = {}
        problem: ImpqError | None = None
        for name, surrogate in candidates.items():
            try:
                found[name] = validate(surrogate.fit, measurements).ordering
            except ImpqError as error:
                problem = error
        if not found:
            assert problem is not None
            raise problem
        best, *richer = found
        for name in richer:
            gain, stderr = found[name].beyond(found[best])
            if gain < -CLEARLY * stderr:
                best = name
        estimate = candidates[best].fit(measurements)
        shares = ", ".join(f"{name} {100 * ordering.share:.0f}%" for name, ordering in found.items())
        return replace(estimate, method=f"auto: {estimate.method} (misordered: {shares})")
