"""What each refiner does besides what every one must (test_conformance.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from impq_refine.evolve import Evolve, mutant
from impq_refine.swaps import Belief, Swaps, improve

from impq_core.references import random_plan
from impq_core.space import IntArray
from impq_core.testing import PlantedGame, least_loss, planted_estimate, planted_space
from impq_core.types import Plan

N, BITS = 10, (4, 3, 2)
TRUTH = planted_estimate(4, N, BITS, strength=0.05)
SPACE = TRUTH.space
BUDGET = int(0.5 * (SPACE.low_bytes + SPACE.high_bytes))
BEST = least_loss(TRUTH, BUDGET)


def _loss(pick: IntArray) -> float:
    return 3.0 + float(TRUTH.predict(pick)[0])


def _start() -> Plan:
    return Plan(SPACE, random_plan(SPACE, BUDGET, np.random.default_rng(0)), BUDGET, method="random")


def test_swaps_need_fewer_measurements_than_evolution() -> None:
    gaps = {}
    for refiner in (Swaps(), Evolve()):
        found = [refiner.refine(replace(_start(), pick=random_plan(SPACE, BUDGET, np.random.default_rng(seed))), None,
                                PlantedGame(SPACE, _loss), PlantedGame(SPACE, _loss), 100, np.random.default_rng(seed))
                 for seed in range(5)]
        gaps[type(refiner)] = np.mean([_loss(plan.pick) - 3 - BEST for plan in found])
    assert gaps[Swaps] < gaps[Evolve]


def test_a_belief_is_corrected_by_what_is_measured() -> None:
    belief = Belief(np.tile([0.0, 0.1, 0.2], (4, 1)), doubt=1.0)
    before, after = np.zeros(4, dtype=np.int64), np.array([2, 0, 0, 0])
    for _ in range(3):
        belief.learn(before, after, 0.9, 0.001)
    draws = np.stack([belief.draw(np.random.default_rng(seed)) for seed in range(300)])
    assert draws[:, 0, 2].mean() - draws[:, 0, 0].mean() == pytest.approx(0.9, abs=0.03)
    assert draws[:, 1, 2].mean() == pytest.approx(0.2, abs=0.05)


def test_improvements_fit_the_budget_and_change_few_layers() -> None:
    rng = np.random.default_rng(2)
    for _ in range(30):
        pick = random_plan(SPACE, BUDGET, rng)
        costs = rng.normal(size=SPACE.nbytes.shape)
        better = improve(SPACE, costs, pick, BUDGET, 4)
        own = np.arange(N)
        assert SPACE.bytes_of(better) <= BUDGET and (better != pick).sum() <= 4
        assert costs[own, better].sum() <= costs[own, pick].sum()
        assert SPACE.bytes_of(mutant(SPACE, pick, BUDGET, 3, rng)) <= BUDGET
    two = planted_space(2, (4, 2))
    swapped = improve(two, np.array([[0.0, 1.0], [0.0, 5.0]]), np.array([0, 1]), two.high_bytes - 1024, 2)
    assert swapped.tolist() == [1, 0]
