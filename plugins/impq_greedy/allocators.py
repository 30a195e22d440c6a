"""Greedy search by predicted loss per byte, and exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from impq_core.costs import Cost, fit
from impq_core.errors import ImpqError
from impq_core.feasible import require_fitting
from impq_core.greedy import demote, promote
from impq_core.interfaces import Allocator
from impq_core.space import SearchSpace
from impq_core.types import Plan, SensitivityEstimate


class Greedy(Allocator):
    """Promotes from all-narrowest by the loss saved per byte, and demotes from all-widest by the loss added per byte;
    the plan is the better of the two results. Pair terms are those with the other layers at their current choices. With
    limits, bytes are weighed together with the limited costs (``impq_core.greedy``)."""

    takes_limits = True

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int, limits: Sequence[Cost] = ()) -> Plan:
        """The better plan of both directions."""
        picks = np.stack([promote(estimate, budget_bytes, limits), demote(estimate, budget_bytes, limits)])
        losses = estimate.predict(picks)
        best = int(losses.argmin())
        return Plan(estimate.space, picks[best], budget_bytes, float(losses[best]), method="greedy")


@dataclass(frozen=True)
class ExhaustiveOptions:
    """Options of the exhaustive allocator.

    Args:
        most: largest number of plans that the search may evaluate.
    """

    most: int = 2_000_000

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError("most must be at least 1")


class Exhaustive(Allocator):
    """Evaluates every plan; its bound equals the plan's predicted loss."""

    Options = ExhaustiveOptions
    takes_limits = True

    def check_space(self, space: SearchSpace) -> None:
        """Raises ImpqError if there are more plans than ``most``."""
        n, m = space.nbytes.shape
        if m**n > self.options.most:
            raise ImpqError(f"allocator exhaustive: {n} layers at {m} widths make {float(m)**n:.3g} plans, more than "
                            f"most={self.options.most}; use qp")

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int, limits: Sequence[Cost] = ()) -> Plan:
        """The optimal plan; raises ImpqError if there are more plans than ``most``, or none fits."""
        space = estimate.space
        space.check_budget(budget_bytes)
        self.check_space(space)
        n, m = space.nbytes.shape
        best, value = space.uniform(m - 1), float("inf")
        plans = itertools.product(range(m), repeat=n)
        while chunk := list(itertools.islice(plans, 50_000)):
            picks = np.array(chunk)
            picks = picks[fit(space, picks, budget_bytes, limits)]
            if len(picks):
                losses = estimate.predict(picks)
                if losses.min() < value:
                    best, value = picks[losses.argmin()], float(losses.min())
        if limits and value == float("inf"):
            require_fitting(space, budget_bytes, limits)
        return Plan(space, best, budget_bytes, value, value, method="exhaustive")
