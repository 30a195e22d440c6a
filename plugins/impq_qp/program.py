"""The ``qp`` allocator: local search finds the plan; convex relaxations and HiGHS prove its lower bound."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from impq_core.costs import Cost, fits
from impq_core.interfaces import Allocator
from impq_core.space import FloatArray, IntArray
from impq_core.types import Plan, SensitivityEstimate
from impq_qp.blocks import parts_of, solve_parts
from impq_qp.linearized import branch
from impq_qp.local import descend, search
from impq_qp.relaxation import Program, Tangent, relaxations

_Allowed = NDArray[np.bool_]
"""(layers, widths): the choices of a part of the program."""

_ROUNDS = 40
"""Largest number of relaxations in a row."""

_PRODUCTS = 500
"""Largest number of products for which HiGHS solves the paper's form; that takes seconds."""

_ROUNDING = 1e-11
"""Precision of bounds, relative to the sum of an estimate's terms."""

_NODES = 10_000
"""Limit on the nodes of HiGHS in one part; parts of ``_PRODUCTS`` products need hundreds."""


@dataclass(frozen=True)
class Options:
    """Options of the quadratic program.

    Args:
        work_limit: limit on the work of the proof, in units of about a second of one desktop core. The units are
            counted, not timed, so that a plan does not depend on the load of the machine. The local search is not
            limited.
        time_limit: limit on the time of the proof in seconds, in addition to ``work_limit``; plans may then differ
            between repetitions. 0 for no limit.
        gap: relative gap at which a plan counts as optimal.
        starts: number of starts of the local search.
        seed: seed of the local search.
        linearization: ``auto`` excludes choices by convex relaxations, splits the rest of the program, and gives HiGHS
            each part of at most 500 products in the paper's form. ``paper`` (a variable for each product of two
            choices) and ``compact`` (Glover: a variable for each choice) give HiGHS the whole program; if there is no
            ``time_limit``, ``work_limit`` is its time limit in seconds.
    """

    work_limit: float = 60.0
    time_limit: float = 0.0
    gap: float = 1e-6
    starts: int = 20
    seed: int = 0
    linearization: str = "auto"

    def __post_init__(self) -> None:
        if self.work_limit <= 0 or self.starts < 1:
            raise ValueError("work_limit and starts must be positive")
        if self.time_limit < 0 or self.gap < 0:
            raise ValueError("time_limit and gap must not be negative")
        if self.linearization not in ("auto", "paper", "compact"):
            raise ValueError(f"linearization must be auto, paper or compact, not '{self.linearization}'")


class QuadraticProgram(Allocator):
    """``min sum_i linear[i, q_i] + sum_{i<j} pairwise[i, q_i, j, q_j]`` within a budget in bytes and limits on further
    costs, each of which is a row of the program.

    A multi-start local search finds a plan, which is replaced only by a better one. Convex relaxations bound the
    program from below and exclude choices that no better plan can take. HiGHS solves the rest with linearised products
    of choices (IMPQ, section on allocation; the paper has two widths and uses SCIP). If the work limit ends the proof
    early, the plan's ``bound`` is below its predicted loss. If layers interact in small parts only, such as blocks
    (``clado -o pairs=block``) and there are no limits, the plan is exact: every combination of a part is scored, and a
    knapsack takes one of each.
    """

    Options = Options
    takes_limits = True

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int, limits: Sequence[Cost] = ()) -> Plan:
        """The best plan, with its proven bound; raises ImpqError if the budget is below the smallest plan, or no plan
        is within budget and limits."""
        space = estimate.space
        space.check_budget(budget_bytes)
        pick, least = solve(estimate, budget_bytes, self.options, limits)
        value = float(estimate.score(pick)[0])
        loss, bound = (float(estimate.losses_of(np.array(score))) for score in (value, min(least, value)))
        return Plan(space, pick, budget_bytes, loss, bound if np.isfinite(bound) else None, method="qp")


def solve(estimate: SensitivityEstimate, budget: int, options: Options,
          limits: Sequence[Cost] = ()) -> tuple[IntArray, float]:
    """The best pick, and a proven lower bound on the scores of all picks (-inf if none was proven)."""
    parts_alone = parts_of(estimate) if options.linearization == "auto" and not limits else None
    pick = solve_parts(estimate, budget, parts_alone) if parts_alone else None
    if pick is not None:
        return pick, float(estimate.score(pick)[0])
    best = _Best(estimate, budget, options, limits)
    whole = np.ones(estimate.space.nbytes.shape, dtype=bool)
    if options.linearization != "auto":
        pick, bound = branch(Program.of(estimate, budget, whole, limits), (), options.linearization, best.target,
                             seconds=options.time_limit or options.work_limit)
        best.offer(pick)
        return best.pick, bound
    work = _Work(options.work_limit, time.monotonic() + options.time_limit if options.time_limit else math.inf)
    # Branch and bound: a heap of open parts (bound, number, choices), and the least bound of the finished ones.
    parts: list[tuple[float, int, _Allowed]] = [(-np.inf, 0, whole)]
    number, finished_bound = 0, np.inf
    while parts and parts[0][0] < best.target and (work.remains or not number):  # at least one part
        floor, _, allowed = heapq.heappop(parts)
        rest = _narrow(best, allowed, floor, work)
        finished_bound = min(finished_bound, rest.closed)
        if rest.program is None:
            continue
        products = np.count_nonzero(rest.program.pairs) // 2
        if products <= _PRODUCTS and work.remains:
            work.solved(products)
            pick, bound = branch(rest.program, rest.cuts, "paper", best.target, work.seconds, _NODES)
            best.offer(pick)
            finished_bound = min(finished_bound, max(bound, rest.bound))
            continue
        for half in rest.halves():
            number += 1
            heapq.heappush(parts, (rest.bound, number, half))
    return best.pick, min(finished_bound, parts[0][0]) if parts else finished_bound


@dataclass
class _Work:
    """Counter of the work of a proof, in units of about a second of one desktop core.

    The rates are rough. Plans depend on them, so another rate is another plan.
    """

    limit: float
    deadline: float
    done: float = 0.0

    @property
    def remains(self) -> bool:
        """Whether neither limit is reached."""
        return self.done < self.limit and time.monotonic() < self.deadline

    @property
    def seconds(self) -> float | None:
        """Seconds to the deadline; None if there is none."""
        return None if math.isinf(self.deadline) else max(self.deadline - time.monotonic(), 0.1)

    def relaxed(self, choices: int) -> None:
        """Count a round of relaxation over ``choices`` choices."""
        self.done += (60 + choices) / 7500

    def solved(self, products: int) -> None:
        """Count a part of ``products`` products that HiGHS solves."""
        self.done += (30 + products) / 300


class _Best:
    """The best pick so far; the first one comes from the local search."""

    def __init__(self, estimate: SensitivityEstimate, budget: int, options: Options, limits: Sequence[Cost]) -> None:
        self.estimate, self.budget, self.limits, self.gap = estimate, budget, limits, options.gap
        terms = [estimate.linear] if estimate.pairwise is None else [estimate.linear, estimate.pairwise]
        self.rounding = _ROUNDING * sum(float(np.abs(term).sum()) for term in terms)
        self.pick = search(estimate, budget, options.starts, np.random.default_rng(options.seed), limits)
        self.value = float(estimate.score(self.pick)[0])

    @property
    def target(self) -> float:
        """The score that a pick must be below to be worth more search."""
        return self.value - max(self.gap * abs(self.value), self.rounding)

    def offer(self, pick: IntArray | None) -> None:
        """Improve a pick by local search, and keep it if it is better; ignored if it is None or does not fit."""
        if pick is None or not fits(self.estimate.space, pick, self.budget, self.limits):
            return
        pick = descend(self.estimate, pick, self.budget, self.limits)
        value = float(self.estimate.score(pick)[0])
        if value < self.value - 1e-9 * abs(self.value):
            self.pick, self.value = pick, value


@dataclass(frozen=True, eq=False)
class _Rest:
    """A part of the program after relaxations.

    Args:
        allowed: its choices that are still open.
        program: the program over these choices; None if no pick remains to be searched.
        cuts: tangents of its pair terms.
        point: optimum of the last relaxation.
        bound: lower bound on the scores of its picks.
        closed: lower bound on the scores of the excluded picks.
    """

    allowed: _Allowed
    program: Program | None
    cuts: tuple[Tangent, ...]
    point: FloatArray
    bound: float
    closed: float

    def halves(self) -> Iterator[_Allowed]:
        """Two parts, with and without one choice: the choice with the largest share in ``point`` of its layer, in the
        layer where this share is the smallest."""
        assert self.program is not None
        is_open = self.allowed[self.program.layers[:, None], self.program.choices] & np.pad(
            self.program.open, ((0, 0), (1, 0)), constant_values=True)  # (n, K+1)
        shares = np.where(is_open, self.program.shares(self.point), -np.inf)
        row = int(np.where(is_open.sum(axis=1) > 1, shares.max(axis=1), np.inf).argmin())
        layer, choice = self.program.layers[row], self.program.choices[row, shares[row].argmax()]
        with_choice, without_choice = self.allowed.copy(), self.allowed.copy()
        with_choice[layer] = False
        with_choice[layer, choice] = True
        without_choice[layer, choice] = False
        yield with_choice
        if without_choice[layer].any():
            yield without_choice


def _narrow(best: _Best, allowed: _Allowed, floor: float, work: _Work) -> _Rest:
    """Exclude choices that no better plan can take, by relaxations, until the bound improves only little.

    Args:
        best: the best pick so far; picks of the relaxations are offered to it.
        allowed: the open choices of this part.
        floor: a lower bound on the scores of its picks.
        work: counter of the rounds.
    """
    allowed, closed = allowed.copy(), np.inf
    while True:
        program = Program.of(best.estimate, best.budget, allowed, best.limits)
        if not len(program):
            if (program.needed > 0).any():
                return _Rest(allowed, None, (), np.zeros((0, 0)), np.inf, closed)
            best.offer(program.base)
            return _Rest(allowed, None, (), np.zeros((0, 0)), program.constant, min(closed, program.constant))
        close = 0.01 * min(best.value - floor, 0.1 * program.unit) / program.unit
        cuts: list[Tangent] = []
        bounds: list[float] = []
        for point, cut in relaxations(program, _ROUNDS, close):
            work.relaxed(program.open.size)
            cuts.append(cut)
            bound, choice_bounds = cut.bound(program)
            floor = max(floor, bound)
            bounds.append(max([bound, *bounds[-1:]]))
            worse = choice_bounds >= best.target
            if worse.any():
                closed = min(closed, best.target)
                allowed[program.layers[:, None], program.choices] &= ~worse
            if floor >= best.target or not allowed.any(axis=1).all():
                return _Rest(allowed, None, (), point, floor, min(closed, best.target))
            remaining = int(allowed.sum()) - len(allowed)  # open choices beyond one for each layer
            if (remaining <= program.open.sum() / 2 or not work.remains
                    or (len(bounds) > 3 and bounds[-1] - bounds[-4] < 0.03 * (best.value - floor))):
                break
        best.offer(program.pick(point))
        if remaining > 0.9 * program.open.sum() or not work.remains:
            return _Rest(allowed, program, tuple(cuts), point, floor, closed)
