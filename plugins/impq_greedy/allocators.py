"""Greedy by predicted loss a byte, and brute force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Allocator
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.types import Plan, SensitivityEstimate


class Greedy(Allocator):
    """Promotes from all-narrowest by the loss saved a byte, and demotes from all-widest by the loss added a byte
    freed; the better of the two is the plan. Pair terms count as the layers stand at each step."""

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """The better of both directions."""
        _require(estimate, budget_bytes)
        picks = np.stack([promote(estimate, budget_bytes), demote(estimate, budget_bytes)])
        losses = estimate.predict(picks)
        best = int(losses.argmin())
        return Plan(estimate.space, picks[best], budget_bytes, float(losses[best]), method="greedy")


def promote(estimate: SensitivityEstimate, budget: int) -> IntArray:
    """From all-narrowest, the change that saves most loss a byte, while one fits and saves."""
    space = estimate.space
    pick = space.uniform(len(space.choices) - 1)
    while True:
        added, grown = _changes(estimate, pick)
        rate = np.where((grown > 0) & (grown <= budget - space.bytes_of(pick)) & (added < 0),
                        -added / np.maximum(grown, 1), -np.inf)
        best = int(rate.argmax())
        if rate.flat[best] == -np.inf:
            return pick
        pick[best // rate.shape[1]] = best % rate.shape[1]


def demote(estimate: SensitivityEstimate, budget: int) -> IntArray:
    """From all-widest, the change that adds least loss a byte freed, until the plan fits."""
    space = estimate.space
    pick = space.uniform(0)
    while space.bytes_of(pick) > budget:
        added, grown = _changes(estimate, pick)
        rate = np.where(grown < 0, added / np.maximum(-grown, 1), np.inf)
        best = int(rate.argmin())
        pick[best // rate.shape[1]] = best % rate.shape[1]
    return pick


def _changes(estimate: SensitivityEstimate, pick: IntArray) -> tuple[FloatArray, IntArray]:
    """Loss added and bytes added (n, m) by moving one layer to each choice, from a pick."""
    space, layers = estimate.space, np.arange(len(pick))
    losses = estimate.linear
    if estimate.pairwise is not None:
        losses = losses + estimate.pairwise[:, :, layers, pick].sum(axis=2)
    return losses - losses[layers, pick][:, None], space.nbytes - space.nbytes[layers, pick][:, None]


@dataclass(frozen=True)
class ExhaustiveOptions:
    """Options of the exhaustive allocator.

    Args:
        most: plans it is willing to look at.
    """

    most: int = 2_000_000

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError("most must be at least 1")


class Exhaustive(Allocator):
    """Looks at every plan, so its bound is its plan."""

    Options = ExhaustiveOptions

    def check_space(self, space: SearchSpace) -> None:
        """There must not be more plans than ``most``."""
        n, m = space.nbytes.shape
        if m**n > self.options.most:
            raise ImpqError(f"allocator exhaustive: {n} layers at {m} widths make {float(m)**n:.3g} plans, more than "
                            f"most={self.options.most}; use qp")

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """The optimum; refuses spaces of more plans than ``most``."""
        _require(estimate, budget_bytes)
        space = estimate.space
        self.check_space(space)
        n, m = space.nbytes.shape
        best, value = space.uniform(m - 1), float("inf")
        plans = itertools.product(range(m), repeat=n)
        while chunk := list(itertools.islice(plans, 50_000)):
            picks = np.array(chunk)
            picks = picks[space.bytes_of_all(picks) <= budget_bytes]
            if len(picks):
                losses = estimate.predict(picks)
                if losses.min() < value:
                    best, value = picks[losses.argmin()], float(losses.min())
        return Plan(space, best, budget_bytes, value, value, method="exhaustive")


def _require(estimate: SensitivityEstimate, budget: int) -> None:
    if budget < estimate.space.low_bytes:
        raise ImpqError(f"a budget of {budget} bytes is below the smallest plan, {estimate.space.low_bytes} bytes")
