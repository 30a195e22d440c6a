"""The surrogate that orders held-out losses best."""

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
    """``additive``, unless ``coverage`` or ``regression`` puts fewer pairs of held-out measurements in the wrong order,
    by more than ``CLEARLY`` standard errors over independent draws. Pairs are of one size and one set of windows, near
    the budget; with few draws the standard error is infinite and ``additive`` stays. (With four orders of the real
    model ``regression`` made plans worse than ``additive`` by 0.04 to 0.06 nats, benchmarks/results/frontier.md.) The
    shares of wrong orders are in the estimate's method, unless there are no pairs.

    If ``additive`` cannot be fitted, as to orders cut to the sizes asked for, ``coverage`` takes its place, or else
    ``regression``. ``covariance`` is no candidate: its objective is a score and predicts no loss.
    """

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The chosen surrogate's estimate; raises ImpqError if none can be fitted and validated."""
        candidates: dict[str, Surrogate] = {"additive": Additive(), "coverage": Coverage(), "regression": Regression()}
        orderings: dict[str, Ordering] = {}
        problem: ImpqError | None = None
        for name, surrogate in candidates.items():
            try:
                orderings[name] = validate(surrogate.fit, measurements).ordering
            except ImpqError as error:
                problem = error
        if not orderings:
            assert problem is not None
            raise problem
        best, *richer = orderings
        for name in richer:
            gain, stderr = orderings[name].beyond(orderings[best])
            if gain < -CLEARLY * stderr:
                best = name
        estimate = candidates[best].fit(measurements)
        shares = ", ".join(f"{name} {100 * ordering.share:.0f}%" for name, ordering in orderings.items()
                           if len(ordering.wrong))
        return replace(estimate, method=f"auto: {estimate.method}" + (f" (misordered: {shares})" if shares else ""))
