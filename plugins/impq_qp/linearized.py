"""The quadratic program with linearised products, built with Pyomo and solved by HiGHS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from impq_core.errors import ImpqError
from impq_core.space import IntArray
from impq_qp.relaxation import Program, Tangent

_Key = tuple[int, int]
"""A layer and one of its narrower choices."""

_TOLERANCE = 1e-7
"""Absolute tolerance of HiGHS on the objective."""


def branch(program: Program, cuts: Sequence[Tangent], form: str, target: float, seconds: float | None = None,
           nodes: int | None = None) -> tuple[IntArray | None, float]:
    """Solve a program by HiGHS.

    Args:
        program: the program.
        cuts: tangents below its pair terms.
        form: ``paper`` or ``compact``.
        target: only picks with a score below it are searched.
        seconds: time limit of HiGHS; None for no limit.
        nodes: limit of HiGHS on the nodes of its search tree; None for no limit.

    Returns:
        A pick with a score below ``target``, or None if HiGHS found none, and a lower bound on the scores of all picks
        (-inf if HiGHS proved none within its limits).

    Raises:
        ImpqError: the solver failed.
    """
    import pyomo.environ as pyo
    from pyomo.contrib.appsi.base import TerminationCondition
    from pyomo.contrib.appsi.solvers.highs import Highs

    keys: list[_Key] = [(int(i), int(k)) for i, k in np.argwhere(program.open)]
    pairs = {(a, b): float(program.pairs[*a, *b]) for a in keys for b in keys
             if a[0] < b[0] and abs(program.pairs[*a, *b]) > 1e-12}
    model = pyo.ConcreteModel()
    model.x = pyo.Var(keys, domain=pyo.Binary)
    products = (_paper if form == "paper" else _compact)(model, keys, pairs)
    model.loss = pyo.Objective(expr=sum(program.linear[key] * model.x[key] for key in keys) + products)
    model.one_choice = pyo.Constraint(range(len(program)), rule=lambda mod, i: sum(
        mod.x[i, k] for k in np.flatnonzero(program.open[i]).tolist()) <= 1)
    model.saved = pyo.Constraint(range(len(program.needed)), rule=lambda mod, r: sum(
        program.saved[r, *key] * mod.x[key] for key in keys) >= program.needed[r] - 1e-12)
    model.cuts = pyo.Constraint(range(len(cuts)), rule=lambda mod, c: products >= cuts[c].constant + sum(
        cuts[c].slope[key] * mod.x[key] for key in keys))

    solver: Any = Highs()
    solver.config.time_limit = seconds
    solver.config.load_solution = False
    solver.highs_options = {"random_seed": 0, "output_flag": False, "mip_rel_gap": 0.0, "mip_abs_gap": 1e-7,
                            "objective_bound": (target - program.constant) / program.unit,
                            **({} if nodes is None else {"mip_max_nodes": nodes})}
    result = solver.solve(model)
    if result.termination_condition in (TerminationCondition.infeasible, TerminationCondition.infeasibleOrUnbounded,
                                        TerminationCondition.objectiveLimit):
        return None, target  # no pick is below the objective bound
    if result.termination_condition not in (TerminationCondition.optimal, TerminationCondition.maxTimeLimit,
                                            TerminationCondition.maxIterations):
        raise ImpqError(f"allocator qp: HiGHS ended with '{result.termination_condition.name}': please report this bug "
                        "with the run folder; --allocator greedy needs no solver")
    bound = result.best_objective_bound
    proven = -np.inf
    if bound is not None and np.isfinite(bound):
        proven = min(target, program.constant + program.unit * (float(bound) - _TOLERANCE))
    if result.best_feasible_objective is None:
        return None, proven
    values = result.solution_loader.get_primals([model.x[key] for key in keys])
    x = np.zeros(program.linear.shape)
    for key in keys:
        x[key] = values[model.x[key]] > 0.5
    return program.pick(x), proven


def _paper(model: Any, keys: list[_Key], pairs: Mapping[tuple[_Key, _Key], float]) -> Any:
    """The sum of pair terms with a variable ``y_ab = x_a x_b`` for each product, as in the paper (McCormick)."""
    import pyomo.environ as pyo

    model.y = pyo.Var(list(pairs), bounds=(0, 1))
    model.both = pyo.Constraint(list(pairs), rule=lambda mod, *ab: mod.y[ab] >= mod.x[ab[:2]] + mod.x[ab[2:]] - 1)
    model.first = pyo.Constraint(list(pairs), rule=lambda mod, *ab: mod.y[ab] <= mod.x[ab[:2]])
    model.second = pyo.Constraint(list(pairs), rule=lambda mod, *ab: mod.y[ab] <= mod.x[ab[2:]])
    return sum(value * model.y[key] for key, value in pairs.items())


def _compact(model: Any, keys: list[_Key], pairs: Mapping[tuple[_Key, _Key], float]) -> Any:
    """The sum of pair terms with one variable for each choice (Glover 1975).

    ``z_a = x_a s_a`` with the row sum ``s_a = sum_b P_ab x_b / 2`` is the smallest z with ``z >= L_a x_a`` and
    ``z >= s_a - U_a (1 - x_a)``, if ``L_a <= s_a <= U_a``. A layer takes one choice at most, so only its smallest
    (largest) term counts in the bound.
    """
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
    model.z = pyo.Var(keys, bounds=lambda mod, *key: (min(0.0, bounds[key][0]), max(0.0, bounds[key][1])))
    model.floor = pyo.Constraint(keys, rule=lambda mod, *key: mod.z[key] >= bounds[key][0] * mod.x[key])
    model.row = pyo.Constraint(keys, rule=lambda mod, *key: mod.z[key] >= sum(
        value * mod.x[b] for b, value in rows[key].items()) - bounds[key][1] * (1 - mod.x[key]))
    return sum(model.z[key] for key in keys)
