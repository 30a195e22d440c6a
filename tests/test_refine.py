"""Refiners, beyond their contract (test_conformance.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from impq_refine.evolve import Evolve, mutant
from impq_refine.judge import difference
from impq_refine.swaps import Belief, Swaps, improve

from impq_core.interfaces import Refiner
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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("refiner", [Swaps(), Evolve()])
def test_a_start_that_is_not_finite_gives_way_to_a_plan_that_is(refiner: Refiner, bad: float) -> None:
    start = _start()

    def loss(pick: IntArray) -> float:
        return bad if np.array_equal(pick, start.pick) else _loss(pick)

    plan = refiner.refine(start, None, PlantedGame(SPACE, loss), PlantedGame(SPACE, loss), 60, np.random.default_rng(0))
    assert np.isfinite(loss(plan.pick))


def test_differences_of_losses_that_are_not_finite() -> None:
    fine, bad = np.array([1.0, 2.0]), np.array([np.nan, 2.0])
    assert difference(fine, fine) == (0.0, 0.0) and difference(fine[:1], fine[1:]) == (-1.0, 0.0)
    assert difference(bad, fine)[0] == np.inf == -difference(fine, bad)[0]
    assert difference(bad, bad)[0] == np.inf  # nothing is gained from one to the other


@pytest.mark.parametrize("scale", [0.0, 2.0**-40, 2.0**40])
def test_a_belief_has_the_scale_of_the_costs(scale: float) -> None:
    belief = Belief(scale * TRUTH.linear, doubt=0.5)
    assert belief.sd == (scale * Belief(TRUTH.linear, 0.5).sd if scale else pytest.approx(0.05 / (N * 2)))


def test_improvements_fit_the_budget_and_change_few_layers() -> None:
    rng = np.random.default_rng(2)
    for _ in range(30):
        pick = random_plan(SPACE, BUDGET, rng)
        costs = rng.normal(size=SPACE.nbytes.shape)
        better = improve(SPACE, costs, pick, BUDGET, 4)
        own = np.arange(N)
        assert SPACE.bytes_of(better) <= BUDGET and (better != pick).sum() <= 4
        assert costs[own, better].sum() <= costs[own, pick].sum()
        assert SPACE.bytes_of(mutant(_start(), pick, 3, rng)) <= BUDGET
    two = planted_space(2, (4, 2))
    swapped = improve(two, np.array([[0.0, 1.0], [0.0, 5.0]]), np.array([0, 1]), two.high_bytes - 1024, 2)
    assert swapped.tolist() == [1, 0]
