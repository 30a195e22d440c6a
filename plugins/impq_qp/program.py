"""The paper's program, linearised, with the local search as its incumbent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Allocator
from impq_core.space import IntArray
from impq_core.types import Plan, SensitivityEstimate
from impq_qp.local import search


@dataclass(frozen=True)
class Options:
    """Options of the quadratic program.

    Args:
        time_limit: seconds the solver may spend on the proof.
        gap: relative gap at which a plan counts as proven.
        starts: starts of the local search that gives the solver its incumbent.
        seed: of the local search.
    """

    time_limit: float = 60.0
    gap: float = 1e-6
    starts: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.time_limit <= 0 or self.gap < 0 or self.starts < 1:
            raise ValueError("time_limit and starts must be positive, gap not negative")


class QuadraticProgram(Allocator):
    """``min sum_i linear[i, q_i] + sum_{i<j} pairwise[i, q_i, j, q_j]`` within a budget in bytes.

    Products of choices become continuous variables ``y >= x + x' - 1, y <= x, y <= x'`` (IMPQ, section on allocation;
    there with two widths and SCIP). A multi-start local search comes first and is given to HiGHS as its start; the
    plan returned is the better of the two, so it is never worse than the heuristic's, and the bound is HiGHS's proof.
    """

    Options = Options

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """The best plan found, with its proven bound."""
        space = estimate.space
        if budget_bytes < space.low_bytes:
            raise ImpqError(f"a budget of {budget_bytes} bytes is below the smallest plan, {space.low_bytes} bytes")
        rng = np.random.default_rng(self.options.seed)
        pick = search(estimate, budget_bytes, self.options.starts, rng)
        value = float(estimate.predict(pick)[0])
        solved, bound = solve(estimate, budget_bytes, pick, self.options.time_limit, self.options.gap)
        if solved is not None and space.bytes_of(solved) <= budget_bytes:
            other = float(estimate.predict(solved)[0])
            if other < value - 1e-9 * max(1.0, abs(value)):
                pick, value = solved, other
        return Plan(space, pick, budget_bytes, value, None if bound is None else min(bound, value), method="qp")


def solve(estimate: SensitivityEstimate, budget: int, start: IntArray, time_limit: float,
          gap: float) -> tuple[IntArray | None, float | None]:
    """HiGHS's pick and its proven lower bound (nats per token); None for what it did not find in time.

    Raises:
        ImpqError: the solver failed, which must not look like a plan.
    """
    import pyomo.environ as pyo
    from pyomo.contrib.appsi.base import TerminationCondition
    from pyomo.contrib.appsi.solvers.highs import Highs

    space = estimate.space
    n, m = space.nbytes.shape
    keys = [(i, k) for i in range(n) for k in range(1, m)]
    # HiGHS's tolerances are absolute, so losses are scaled to the order of 1.
    scale = max(float(np.abs(estimate.linear).max()), 1e-9)
    pairs = {(a, b): float(estimate.pairwise[a[0], a[1], b[0], b[1]]) / scale
             for a in keys for b in keys if a[0] < b[0]} if estimate.pairwise is not None else {}
    pairs = {key: value for key, value in pairs.items() if abs(value) > 1e-12}

    model = pyo.ConcreteModel()
    model.x = pyo.Var(keys, domain=pyo.Binary)
    model.y = pyo.Var(list(pairs), bounds=(0, 1))
    model.loss = pyo.Objective(expr=sum(estimate.linear[i, k] / scale * model.x[i, k] for i, k in keys)
                               + sum(value * model.y[key] for key, value in pairs.items()))
    model.one = pyo.Constraint(range(n), rule=lambda mod, i: sum(mod.x[i, k] for k in range(1, m)) <= 1)
    saved = {(i, k): int(space.nbytes[i, 0] - space.nbytes[i, k]) for i, k in keys}
    unit = max(saved.values(), default=1) or 1
    model.budget = pyo.Constraint(expr=sum(saved[key] / unit * model.x[key] for key in keys)
                                  >= (space.high_bytes - budget) / unit - 1e-12) if keys else pyo.Constraint.Skip
    _link_products(model, list(pairs))

    chosen = {key: int(start[key[0]] == key[1]) for key in keys}
    for key in keys:
        model.x[key].set_value(chosen[key])
    for a, b in pairs:
        model.y[a, b].set_value(chosen[a] * chosen[b])

    solver: Any = Highs()
    solver.config.time_limit = time_limit
    solver.config.mip_gap = gap
    solver.config.load_solution = False
    solver.config.warmstart = True
    solver.highs_options = {"random_seed": 0, "output_flag": False}
    result = solver.solve(model)
    if result.termination_condition not in (TerminationCondition.optimal, TerminationCondition.maxTimeLimit):
        raise ImpqError(f"HiGHS ended with '{result.termination_condition.name}'; -o starts and budgets as they are, "
                        "this is a bug worth reporting")
    bound = result.best_objective_bound
    proven = None if bound is None or not np.isfinite(bound) else float(bound) * scale
    if result.best_feasible_objective is None:
        return None, proven
    values = result.solution_loader.get_primals([model.x[key] for key in keys])
    pick = np.zeros(n, dtype=np.int64)
    for i, k in keys:
        if values[model.x[i, k]] > 0.5:
            pick[i] = k
    return pick, proven


def _link_products(model: Any, pairs: list[Any]) -> None:
    import pyomo.environ as pyo

    model.low = pyo.Constraint(pairs, rule=lambda mod, *ab: mod.y[ab] >= mod.x[ab[:2]] + mod.x[ab[2:]] - 1)
    model.left = pyo.Constraint(pairs, rule=lambda mod, *ab: mod.y[ab] <= mod.x[ab[:2]])
    model.right = pyo.Constraint(pairs, rule=lambda mod, *ab: mod.y[ab] <= mod.x[ab[2:]])
