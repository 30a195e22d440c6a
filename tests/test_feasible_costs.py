"""Costs that are at least 0 and grow as layers get narrower."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from impq_greedy.allocators import Greedy

from impq_core.feasible_costs import feasible
from impq_core.space import Choice, FloatArray, LayerSpec, LinearSpec, SearchSpace
from impq_core.testing import planted_estimate
from impq_core.types import SensitivityEstimate

NAMES = ("4", "3", "2", "1")


def space_of(nbytes: FloatArray, names: tuple[str, ...] = NAMES) -> SearchSpace:
    layers = tuple(LayerSpec(f"l{i}", i, (LinearSpec(f"l{i}.w", 8, 64),)) for i in range(len(nbytes)))
    choices = tuple(Choice(float(4 - k), 64, name) for k, name in enumerate(names))
    return SearchSpace(layers, choices, np.asarray(nbytes, dtype=np.int64))


COSTS = arrays(np.float64, (3, 4), elements=st.floats(-5, 5, width=16)).map(
    lambda costs: np.concatenate([np.zeros((3, 1)), costs[:, 1:]], axis=1))


def estimate_of(costs: FloatArray, names: tuple[str, ...] = NAMES) -> SensitivityEstimate:
    return SensitivityEstimate(space_of(np.array([[40, 30, 20, 10]] * len(costs)), names), costs)


@given(COSTS)
def test_no_cost_is_negative_or_smaller_at_fewer_bytes(costs: FloatArray) -> None:
    found = feasible(estimate_of(costs)).linear
    assert (found >= 0).all() and not found[:, 0].any()
    assert (np.diff(found, axis=1) >= 0).all()


@given(COSTS)
def test_costs_that_are_feasible_stay(costs: FloatArray) -> None:
    once = feasible(estimate_of(costs))
    np.testing.assert_allclose(feasible(once).linear, once.linear, atol=1e-12)
    rising = np.sort(np.abs(costs), axis=1)
    estimate = estimate_of(rising)
    assert feasible(estimate) is estimate


@settings(max_examples=30)
@given(COSTS, COSTS)
def test_no_feasible_costs_are_nearer(costs: FloatArray, other: FloatArray) -> None:
    """The projection onto a convex set: the angle to every point of the set is obtuse."""
    found = feasible(estimate_of(costs)).linear
    rival = np.sort(np.abs(other), axis=1)
    assert ((costs - found) * (rival - found)).sum() <= 1e-9


@given(COSTS)
def test_an_estimate_of_pairs_or_of_other_forms_keeps_its_order(costs: FloatArray) -> None:
    names = ("Q6_K", "IQ4_XS", "Q4_0", "Q2_K")
    np.testing.assert_array_equal(feasible(estimate_of(costs, names)).linear, np.maximum(costs, 0))
    pairs = planted_estimate(0, 4, (4, 3, 2), 0.5)
    assert pairs.pairwise is not None
    wild = replace(pairs, linear=-np.abs(pairs.linear))
    assert feasible(wild) is wild


def test_a_program_cannot_live_on_noise() -> None:
    """A layer whose narrow width has a negative cost pays for nothing: the plan keeps its predicted loss above 0."""
    costs = np.array([[0.0, 0.1, 0.2, -3.0], [0.0, 0.1, 0.3, 0.5]])
    estimate = feasible(estimate_of(costs))
    plan = Greedy().allocate(estimate, 60)
    assert plan.predicted_loss is not None and plan.predicted_loss >= 0
