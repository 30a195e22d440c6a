"""The paper's program, linearised, with the local search as its incumbent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from impq_core.errors import ImpqError
from impq_core.interfaces import Allocator
from impq_core.space import IntArray
from impq_core.types import Plan, SensitivityEstimate
from impq_qp.local import search

_Key = tuple[int, int]
"""A layer and one of its narrower choices."""


@dataclass(frozen=True)
class Options:
    """Options of the quadratic program.

    Args:
        time_limit: seconds the solver may spend on the proof.
        gap: relative gap at which a plan counts as proven.
        starts: starts of the local search that gives the solver its incumbent.
        seed: of the local search.
        linearization: ``paper`` (a variable for each product of two choices) or ``compact`` (Glover: one for each
            choice), the same program with a weaker relaxation that scales further; ``auto`` is the paper's up to
            500 products.
    """

    time_limit: float = 60.0
    gap: float = 1e-6
    starts: int = 20
    seed: int = 0
    linearization: str = "auto"

    def __post_init__(self) -> None:
        if self.time_limit <= 0 or self.gap < 0 or self.starts < 1:
            raise ValueError("time_limit and starts must be positive, gap not negative")
        if self.linearization not in ("auto", "paper", "compact"):
            raise ValueError(f"linearization must be auto, paper or compact, not '{self.linearization}'")


class QuadraticProgram(Allocator):
    """``min sum_i linear[i, q_i] + sum_{i<j} pairwise[i, q_i, j, q_j]`` within a budget in bytes.

    Products of choices become continuous variables ``y >= x + x' - 1, y <= x, y <= x'`` (IMPQ, section on allocation;
    there with two widths and SCIP), or, where they are many, Glover's compact form. A multi-start local search comes
    first and is given to HiGHS as its start; the plan returned is the better of the two, so it is never worse than the
    heuristic's, and the bound is HiGHS's proof.
    """

    Options = Options

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """The best plan found, with its proven bound."""
        space = estimate.space
        if budget_bytes < space.low_bytes:
            raise ImpqError(f"a budget of {budget_bytes} bytes is below the smallest plan, {space.low_bytes} bytes")
        rng = np.random.default_rng(self.options.seed)
        pick = search(estimate, budget_bytes, self.options.starts, rng)
        value = float(estimate.score(pick)[0])
        solved, bound = solve(estimate, budget_bytes, pick, self.options)
        if solved is not None and space.bytes_of(solved) <= budget_bytes:
            other = float(estimate.score(solved)[0])
            if other < value - 1e-9 * max(1.0, abs(value)):
                pick, value = solved, other
        loss, least = (None if score is None else float(estimate.losses_of(np.array(score)))
                       for score in (value, None if bound is None else min(bound, value)))
        return Plan(space, pick, budget_bytes, loss, least, method="qp")


def solve(estimate: SensitivityEstimate, budget: int, start: IntArray,
          options: Options) -> tuple[IntArray | None, float | None]:
    """HiGHS's pick and its proven lower bound on the score; None for what it did not find in time.

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
    chosen = {key: int(start[key[0]] == key[1]) for key in keys}

    model = pyo.ConcreteModel()
    model.x = pyo.Var(keys, domain=pyo.Binary, initialize=chosen)
    compact = options.linearization == "compact" or (options.linearization == "auto" and len(pairs) > 500)
    products = (_compact if compact else _paper)(model, keys, pairs, chosen)
    model.loss = pyo.Objective(expr=sum(estimate.linear[i, k] / scale * model.x[i, k] for i, k in keys) + products)
    model.one = pyo.Constraint(range(n), rule=lambda mod, i: sum(mod.x[i, k] for k in range(1, m)) <= 1)
    saved = {(i, k): int(space.nbytes[i, 0] - space.nbytes[i, k]) for i, k in keys}
    unit = max(saved.values(), default=1) or 1
    model.budget = pyo.Constraint(expr=sum(saved[key] / unit * model.x[key] for key in keys)
                                  >= (space.high_bytes - budget) / unit - 1e-12) if keys else pyo.Constraint.Skip

    solver: Any = Highs()
    solver.config.time_limit = options.time_limit
    solver.config.mip_gap = options.gap
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


def _paper(model: Any, keys: list[_Key], pairs: Mapping[tuple[_Key, _Key], float], chosen: Mapping[_Key, int]) -> Any:
    """The sum of pair terms with a variable for each product, as the paper has it."""
    import pyomo.environ as pyo

    model.y = pyo.Var(list(pairs), bounds=(0, 1), initialize={(*a, *b): chosen[a] * chosen[b] for a, b in pairs})
    model.low = pyo.Constraint(list(pairs), rule=lambda mod, *ab: mod.y[ab] >= mod.x[ab[:2]] + mod.x[ab[2:]] - 1)
    model.left = pyo.Constraint(list(pairs), rule=lambda mod, *ab: mod.y[ab] <= mod.x[ab[:2]])
    model.right = pyo.Constraint(list(pairs), rule=lambda mod, *ab: mod.y[ab] <= mod.x[ab[2:]])
    return sum(value * model.y[key] for key, value in pairs.items())


def _compact(model: Any, keys: list[_Key], pairs: Mapping[tuple[_Key, _Key], float], chosen: Mapping[_Key, int]) -> Any:
    """The sum of pair terms with one variable a choice (Glover 1975): ``z_a = x_a s_a`` for the row sum ``s_a = sum_b
    P_ab x_b / 2`` is the least z with ``z >= L_a x_a`` and ``z >= s_a - U_a (1 - x_a)``, where ``L_a <= s_a <= U_a``;
    as a layer takes one choice at most, each layer counts in the bounds once."""
    import pyomo.environ as pyo

    rows: dict[_Key, dict[_Key, float]] = {key: {} for key in keys}
    for (a, b), value in pairs.items():
        rows[a][b] = rows[b][a] = value / 2

    def reach(row: Mapping[_Key, float], end: Callable[..., float]) -> float:
        layers: dict[int, float] = {}
        for (layer, _), value in row.items():
            layers[layer] = end(layers.get(layer, 0.0), value)
        return sum(layers.values())

    bounds = {key: (reach(row, min), reach(row, max)) for key, row in rows.items()}
    now = {key: chosen[key] * sum(value * chosen[b] for b, value in row.items()) for key, row in rows.items()}
    model.z = pyo.Var(keys, bounds=lambda mod, *key: (min(0.0, bounds[key][0]), max(0.0, bounds[key][1])),
                      initialize=now)
    model.floor = pyo.Constraint(keys, rule=lambda mod, *key: mod.z[key] >= bounds[key][0] * mod.x[key])
    model.row = pyo.Constraint(keys, rule=lambda mod, *key: mod.z[key] >= sum(
        value * mod.x[b] for b, value in rows[key].items()) - bounds[key][1] * (1 - mod.x[key]))
    return sum(model.z[key] for key in keys)
