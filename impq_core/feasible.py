"""Picks within a budget and limits: whether there is one, and the one of least cost, as an integer program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from impq_core.costs import Cost, fits
from impq_core.errors import UsageError
from impq_core.space import FloatArray, IntArray, SearchSpace
from impq_core.units import at_least

_GAP = 1e-4
"""Relative gap at which HiGHS ends."""

_NODES = 2_000
"""Limit on the nodes of HiGHS: a count, so that a pick does not depend on the load of the machine."""

_TRIES = 8
"""Most programs that are solved until a pick fits without HiGHS's tolerances."""


def least(space: SearchSpace, values: FloatArray, budget: int, limits: Sequence[Cost] = ()) -> IntArray | None:
    """The pick (n,) of nearly least sum of values within a budget and limits, by HiGHS.

    Args:
        space: layers and choices.
        values: (n, m), of each layer at each choice.
        budget: bytes, pinned layers included.
        limits: costs with limits.

    Returns:
        The pick; None if no pick fits, or if none was found within the limit of nodes.
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    n, m = values.shape
    tables = [space.nbytes.astype(np.float64), *(cost.values for cost in limits)]
    rooms = [float(budget - space.fixed_bytes), *(cost.most - cost.fixed for cost in limits)]
    rows, bounds = [], []
    for table, room in zip(tables, rooms, strict=True):
        above = table - table.min(axis=1, keepdims=True)
        scale = float(above.max()) or 1.0
        rows.append((above / scale).ravel())
        bounds.append((room - float(table.min(axis=1).sum())) / scale)
    if min(bounds) < -1e-9:
        return None
    one_choice = LinearConstraint(sparse.kron(sparse.eye(n), np.ones((1, m))), 1, 1)
    objective = values - values.min(axis=1, keepdims=True)
    objective = (objective / (float(objective.max()) or 1.0)).ravel()
    most = np.array(bounds)
    for _ in range(_TRIES):
        found = milp(objective, integrality=np.ones(n * m), bounds=Bounds(0, 1),
                     constraints=[one_choice, LinearConstraint(np.stack(rows), -np.inf, most)],
                     options={"mip_rel_gap": _GAP, "node_limit": _NODES})
        if found.x is None:
            return None
        pick: IntArray = found.x.reshape(n, m).argmax(axis=1).astype(np.int64)
        if fits(space, pick, budget, limits):
            return pick
        taken = np.array([float(row.reshape(n, m)[np.arange(n), pick].sum()) for row in rows])
        most = np.minimum(most, np.array(bounds) - 2 * np.maximum(taken - np.array(bounds), 1e-7))
    return None


def any_fitting(space: SearchSpace, budget: int, limits: Sequence[Cost] = ()) -> IntArray:
    """A pick (n,) within a budget and limits: all-narrowest if that fits, else one of nearly least cost in the first
    limit that it exceeds.

    Raises:
        ImpqError: there is none, or none was found.
    """
    space.check_budget(budget)
    narrowest = space.uniform(len(space.choices) - 1)
    exceeded = [cost for cost in limits if cost.room(narrowest) < 0]
    if not exceeded:
        return narrowest
    pick = least(space, exceeded[0].values, budget, limits)
    if pick is None:
        require_fitting(space, budget, limits)
        raise UsageError("no plan within the budget and the limits was found: raise one of them a little")
    return pick


def require_fitting(space: SearchSpace, budget: int, limits: Sequence[Cost], text: str = "") -> None:
    """Check a budget and limits against each other, before anything is measured.

    Args:
        space: layers and choices.
        budget: bytes of the plan; at least those of the smallest.
        limits: costs with limits.
        text: the budget as the user wrote it.

    Raises:
        UsageError: no plan is within them; the message has the nearest that are.
    """
    for cost in limits:
        lowest = cost.fixed + float(cost.values.min(axis=1).sum())
        if lowest > cost.most:
            raise UsageError(f"--limit {_written(cost)} is below what any plan takes: the least is "
                             f"{at_least(lowest, cost.unit)}")
    if not limits or least(space, limits[0].values, budget, limits) is not None:
        return
    budget_text = text or f"{budget / 1e6:.4g}MB"
    every = " and ".join(f"--limit {_written(cost)}" for cost in limits)
    nearest = []
    for number, cost in enumerate(limits):
        others = [other for at, other in enumerate(limits) if at != number]
        best = least(space, cost.values, budget, others)
        if best is not None:
            nearest.append(f"{cost.name}={at_least(cost.of(best), cost.unit)} with the rest as it is")
    smallest = least(space, space.nbytes.astype(np.float64), space.high_bytes, limits)
    if smallest is not None:
        nbytes = space.bytes_of(smallest)
        nearest.append(f"quantized weights of {nbytes}B ({space.nominal_bits(nbytes):.4g}bits) with the limits as they "
                       "are")
    raise UsageError(f"no plan is within --budget {budget_text} and {every}"
                     + (f": possible are {', or '.join(nearest)}" if nearest else ""))


def _written(cost: Cost) -> str:
    amount, unit = (cost.limit / 1e6, "MB") if cost.unit == "bytes" else (cost.limit, cost.unit)
    return f"{cost.name}={amount:.9g}{unit}"
