"""The choice between surrogates by cross-validation."""

from __future__ import annotations

from dataclasses import replace

from impq_core.errors import ImpqError
from impq_core.interfaces import Surrogate
from impq_core.types import Measurements, SensitivityEstimate
from impq_core.validation import Ordering, validate
from impq_surrogates.regression import Coverage, Regression
from impq_surrogates.shapley import Additive

SIGNIFICANT = 2.0
"""Standard errors by which a surrogate must be better than ``additive``."""


class Auto(Surrogate):
    """``additive``, unless ``coverage`` or ``regression`` is significantly better in cross-validation.

    Surrogates are compared by the share of pairs of held-out measurements that they put in the wrong order; the two
    measurements of a pair have one size near the budget and one set of windows. A difference counts if it exceeds
    ``SIGNIFICANT`` standard errors over independent draws; with few draws the standard error is infinite. (With four
    orders of the real model ``regression`` made plans worse than ``additive`` by 0.04 to 0.06 nats per token,
    benchmarks/results/frontier.md.) The estimate's ``method`` holds the shares, unless there are no pairs.

    If ``additive`` cannot be fitted, for example because orders were cut to sizes near the budget, the comparison
    starts from ``coverage``, or else from ``regression``. ``covariance`` is no candidate: its objective is a score and
    predicts no loss.
    """

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The estimate of the chosen surrogate; raises ImpqError if no candidate can be fitted and validated."""
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
            gain, stderr = orderings[name].minus(orderings[best])
            if gain < -SIGNIFICANT * stderr:
                best = name
        estimate = candidates[best].fit(measurements)
        shares = ", ".join(f"{name} {100 * ordering.share:.0f}%" for name, ordering in orderings.items()
                           if len(ordering.wrong))
        return replace(estimate, method=f"auto: {estimate.method}" + (f" (misordered: {shares})" if shares else ""))
