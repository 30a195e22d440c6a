"""The paper's program: local search for a plan, convex relaxations and HiGHS for the proof."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from impq_core.interfaces import Allocator
from impq_core.space import FloatArray, IntArray
from impq_core.types import Plan, SensitivityEstimate
from impq_qp.linearized import branch
from impq_qp.local import descend, search
from impq_qp.relaxation import Program, Tangent, relaxations

_Allowed = NDArray[np.bool_]
"""(layers, widths): the choices of a part of the program."""

_ROUNDS = 40
_PRODUCTS = 500
"""Most products of a part that HiGHS solves in seconds in the paper's form."""

_ROUNDING = 1e-11
"""Rounding of bounds, relative to the sum of an estimate's terms."""

_NODES = 10_000
"""Most nodes of HiGHS in one part; parts of ``_PRODUCTS`` products take hundreds."""


@dataclass(frozen=True)
class Options:
    """Options of the quadratic program.

    Args:
        work_limit: limit of the proof, in units that take about a second of one desktop core; they are counted, not
            timed, so that a plan does not depend on the load of the machine. The local search is never cut short.
        time_limit: seconds after which the proof ends too; the plan may then differ from run to run. 0 for none.
        gap: relative gap at which a plan counts as proven.
        starts: starts of the local search.
        seed: of the local search.
        linearization: ``auto`` closes choices by convex relaxations, splits what stays open, and gives HiGHS each part
            once it has no more than 500 products, in the paper's form; ``paper`` (a variable for each product of two
            choices) and ``compact`` (Glover: one for each choice) give HiGHS the whole program as it is, and
            ``work_limit`` as seconds if there is no ``time_limit``.
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
    """``min sum_i linear[i, q_i] + sum_{i<j} pairwise[i, q_i, j, q_j]`` within a budget in bytes.

    A multi-start local search finds a plan, which is replaced only by a better one. Convex relaxations bound the
    program and close choices that no better plan can take; HiGHS solves what they leave open, with products of choices
    linearised (IMPQ, section on allocation; there with two widths and SCIP). If the work limit ends the proof, the
    plan's bound lies below its loss by the gap that is left.
    """

    Options = Options

    def allocate(self, estimate: SensitivityEstimate, budget_bytes: int) -> Plan:
        """The best plan found, with its proven bound."""
        space = estimate.space
        space.check_budget(budget_bytes)
        pick, least = solve(estimate, budget_bytes, self.options)
        value = float(estimate.score(pick)[0])
        loss, bound = (float(estimate.losses_of(np.array(score))) for score in (value, min(least, value)))
        return Plan(space, pick, budget_bytes, loss, bound if np.isfinite(bound) else None, method="qp")


def solve(estimate: SensitivityEstimate, budget: int, options: Options) -> tuple[IntArray, float]:
    """The best pick found, and a proven lower bound on the score of all picks; -inf if nothing was proven."""
    best = _Best(estimate, budget, options)
    whole = np.ones(estimate.space.nbytes.shape, dtype=bool)
    if options.linearization != "auto":
        pick, bound = branch(Program.of(estimate, budget, whole), (), options.linearization, best.target,
                             seconds=options.time_limit or options.work_limit)
        best.offer(pick)
        return best.pick, bound
    work = _Work(options.work_limit, time.monotonic() + options.time_limit if options.time_limit else math.inf)
    parts: list[tuple[float, int, _Allowed]] = [(-np.inf, 0, whole)]  # not settled yet, least bound first
    number, settled = 0, np.inf
    while parts and parts[0][0] < best.target and (work.left or not number):  # once at least
        floor, _, allowed = heapq.heappop(parts)
        rest = _narrow(best, allowed, floor, work)
        settled = min(settled, rest.closed)
        if rest.program is None:
            continue
        products = np.count_nonzero(rest.program.pairs) // 2
        if products <= _PRODUCTS and work.left:
            work.solved(products)
            pick, bound = branch(rest.program, rest.cuts, "paper", best.target, work.seconds, _NODES)
            best.offer(pick)
            settled = min(settled, max(bound, rest.bound))
            continue
        for half in rest.halves():
            number += 1
            heapq.heappush(parts, (rest.bound, number, half))
    return best.pick, min(settled, parts[0][0]) if parts else settled


@dataclass
class _Work:
    """Cost of a proof so far, in units of about a second of one desktop core. The rates are rough; changing them
    changes plans whose proof is cut short."""

    limit: float
    deadline: float
    done: float = 0.0

    @property
    def left(self) -> bool:
        """Whether the proof may go on."""
        return self.done < self.limit and time.monotonic() < self.deadline

    @property
    def seconds(self) -> float | None:
        """Seconds to the deadline; None without one."""
        return None if math.isinf(self.deadline) else max(self.deadline - time.monotonic(), 0.1)

    def relaxed(self, choices: int) -> None:
        """Charge a round of relaxation over ``choices`` choices."""
        self.done += (60 + choices) / 7500

    def solved(self, products: int) -> None:
        """Charge HiGHS's solution of a part with ``products`` products."""
        self.done += (30 + products) / 300


class _Best:
    """The best pick so far, the local search's at first."""

    def __init__(self, estimate: SensitivityEstimate, budget: int, options: Options) -> None:
        self.estimate, self.budget, self.gap = estimate, budget, options.gap
        terms = [estimate.linear] if estimate.pairwise is None else [estimate.linear, estimate.pairwise]
        self.rounding = _ROUNDING * sum(float(np.abs(term).sum()) for term in terms)
        self.pick = search(estimate, budget, options.starts, np.random.default_rng(options.seed))
        self.value = float(estimate.score(self.pick)[0])

    @property
    def target(self) -> float:
        """The score that a pick must be below to be worth more search."""
        return self.value - max(self.gap * abs(self.value), self.rounding)

    def offer(self, pick: IntArray | None) -> None:
        """Improve a pick by local moves and take it, if it fits and is better."""
        if pick is None or self.estimate.space.bytes_of(pick) > self.budget:
            return
        pick = descend(self.estimate, pick, self.budget)
        value = float(self.estimate.score(pick)[0])
        if value < self.value - 1e-9 * abs(self.value):
            self.pick, self.value = pick, value


@dataclass(frozen=True, eq=False)
class _Left:
    """A part of the program after its relaxations.

    Args:
        allowed: the choices left open.
        program: the program over them; None if the part is settled.
        cuts: tangents of its pair terms.
        point: the last relaxation's optimum.
        bound: lower bound on the scores of its picks.
        closed: lower bound on the scores of the picks that were closed.
    """

    allowed: _Allowed
    program: Program | None
    cuts: tuple[Tangent, ...]
    point: FloatArray
    bound: float
    closed: float

    def halves(self) -> Iterator[_Allowed]:
        """Two parts of it: with and without the likeliest choice of the layer least sure of its own."""
        assert self.program is not None
        still = self.allowed[self.program.layers[:, None], self.program.choices] & np.pad(
            self.program.open, ((0, 0), (1, 0)), constant_values=True)
        shares = np.where(still, self.program.shares(self.point), -np.inf)
        layer = int(np.where(still.sum(axis=1) > 1, shares.max(axis=1), np.inf).argmin())
        where = self.program.layers[layer], self.program.choices[layer, shares[layer].argmax()]
        with_it, without = self.allowed.copy(), self.allowed.copy()
        with_it[where[0]] = False
        with_it[where] = True
        without[where] = False
        yield with_it
        if without[where[0]].any():
            yield without


def _narrow(best: _Best, allowed: _Allowed, floor: float, work: _Work) -> _Left:
    """Close the choices that no better plan can take, as relaxations prove, until they prove little more.

    Args:
        best: offered what relaxations suggest.
        allowed: the choices open in this part.
        floor: a known lower bound on the scores of its picks.
        work: charged with every round.
    """
    allowed, closed = allowed.copy(), np.inf
    while True:
        program = Program.of(best.estimate, best.budget, allowed)
        if not len(program):
            if program.needed > 0:
                return _Left(allowed, None, (), np.zeros((0, 0)), np.inf, closed)
            best.offer(program.base)
            return _Left(allowed, None, (), np.zeros((0, 0)), program.constant, min(closed, program.constant))
        close = 0.01 * min(best.value - floor, 0.1 * program.unit) / program.unit
        cuts: list[Tangent] = []
        bounds: list[float] = []
        for point, cut in relaxations(program, _ROUNDS, close):
            work.relaxed(program.open.size)
            cuts.append(cut)
            whole, each = cut.bound(program)
            floor = max(floor, whole)
            bounds.append(max([whole, *bounds[-1:]]))
            worse = each >= best.target
            if worse.any():
                closed = min(closed, best.target)
                allowed[program.layers[:, None], program.choices] &= ~worse
            if floor >= best.target or not allowed.any(axis=1).all():
                return _Left(allowed, None, (), point, floor, min(closed, best.target))
            still = int(allowed.sum()) - len(allowed)
            if (still <= program.open.sum() / 2 or not work.left
                    or (len(bounds) > 3 and bounds[-1] - bounds[-4] < 0.03 * (best.value - floor))):
                break
        best.offer(program.pick(point))
        if still > 0.9 * program.open.sum() or not work.left:
            return _Left(allowed, program, tuple(cuts), point, floor, closed)
