"""The surrogate that tells unseen losses best."""

from __future__ import annotations

from dataclasses import replace

from impq_core.errors import ImpqError
from impq_core.interfaces import Surrogate
from impq_core.types import Measurements, SensitivityEstimate
from impq_core.validation import validate
from impq_surrogates.regression import Coverage, Regression
from impq_surrogates.shapley import Additive


class Auto(Surrogate):
    """``additive``, ``coverage`` or ``regression``: the one that puts least pairs of held-out measurements of one size
    in the wrong order; the simpler one where they are equal. What was found is in the estimate's method.

    ``covariance`` is not among them: its objective is a score and forecasts no loss.
    """

    def fit(self, measurements: Measurements) -> SensitivityEstimate:
        """The best one's estimate; raises ImpqError where none can be fitted or validated."""
        candidates: dict[str, Surrogate] = {"additive": Additive(), "coverage": Coverage(), "regression": Regression()}
        found: dict[str, float] = {}
        problem: ImpqError | None = None
        for name, surrogate in candidates.items():
            try:
                found[name] = validate(surrogate.fit, measurements).misordered
            except ImpqError as error:
                problem = error
        if not found:
            assert problem is not None
            raise problem
        best = min(found, key=lambda name: found[name])
        estimate = candidates[best].fit(measurements)
        shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in found.items())
        return replace(estimate, method=f"auto: {estimate.method} (misordered: {shares})")
