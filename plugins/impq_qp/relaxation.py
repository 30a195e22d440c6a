"""Convex relaxations of the quadratic program: bounds, linear cuts, and choices that no better plan can take.

Within a layer at most one narrower choice x_a is 1, so ``x_i' S_i x_i = diag(S_i)'x_i`` for any symmetric block S_i.
Adding such a shift S to the pair terms P and subtracting its diagonal from the linear terms changes the score of no
plan. If ``P + S`` is positive semidefinite, ``x'(P + S)x/2 - diag(S)'x/2`` is convex and equals ``x'Px/2`` at every
plan, so each of its tangents bounds the pair terms of all plans from below. This is quadratic convex reformulation
(Billionnet, Elloumi, Plateau 2009) with blocks in place of a diagonal. Its best bound is that of the semidefinite
relaxation with ``X_ii = diag(x_i)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from impq_core.costs import Cost
from impq_core.space import FloatArray, IntArray
from impq_core.types import SensitivityEstimate

_ROUNDING = 1e-12
"""Margin of bounds for rounding errors, relative to the sum of their terms."""

_NEVER = 1e9
"""A cost above any cost or price of a program."""

_FREE = 1e-18
"""A price of a byte that counts as 0, in units of a program: it changes a dual bound by less than rounding."""

_DEAR = 1e6
"""Price at which what is not saved of budget and limits may be bought, in units of a program."""

_SWEEPS = 10
"""Sweeps of coordinate descent in each round; the next round starts from the result."""


@dataclass(frozen=True, eq=False)
class Program:
    """The program over the open choices: ``constant + unit * min (linear'x + x' pairs x / 2)`` over binary x (n, K)
    with at most one 1 in a row and ``saved_r'x >= needed_r`` for the budget (r = 0) and for each limit. The *relaxed*
    program allows every x between 0 and 1.

    A choice is open until it is shown that no better plan takes it. The n layers of the program are those with more
    than one open choice; K + 1 is the largest number of open choices of a layer. A row of zeros in x is the layer's
    widest open choice, ``x_ik = 1`` its choice ``choices[i, k+1]``.

    Args:
        choices: (n, K+1), the open choices of each layer, from wide to narrow; padded if there are fewer.
        layers: (n,), the numbers of the layers.
        base: the pick of x = 0; layers with one open choice keep it.
        open: (n, K), false for padding.
        constant: score of ``base``.
        unit: scale of the scores, so that the numbers of the program are of the order of 1.
        linear: (n, K).
        pairs: (n, K, n, K), symmetric, 0 within a layer.
        saved: (R, n, K) bytes, and then each limited cost, below the widest open choice, scaled to a maximum of 1.
        needed: (R,) what must be saved of each, on the scale of ``saved``.
    """

    choices: IntArray
    layers: IntArray
    base: IntArray
    open: NDArray[np.bool_]
    constant: float
    unit: float
    linear: FloatArray
    pairs: FloatArray
    saved: FloatArray
    needed: FloatArray

    @classmethod
    def of(cls, estimate: SensitivityEstimate, budget: int, allowed: NDArray[np.bool_],
           limits: Sequence[Cost] = ()) -> Program:
        """The program over the choices ``allowed`` (layers, widths); every layer has at least one."""
        space = estimate.space
        all_layers = np.arange(len(allowed))
        base = allowed.argmax(axis=1)
        layers = np.flatnonzero(allowed.sum(axis=1) > 1)
        order = np.argsort(~allowed, axis=1, kind="stable")[:, :allowed.sum(axis=1).max()]  # allowed choices first
        choices = order[layers]
        rows = layers[:, None]
        is_open = allowed[rows, choices][:, 1:]
        costs = estimate.linear  # (layers, widths): with all other layers at the base
        pairs = np.zeros((*is_open.shape, *is_open.shape))
        if estimate.pairwise is not None:
            costs = costs + estimate.pairwise[:, :, all_layers, base].sum(axis=2)
            terms = estimate.pairwise[rows, choices][:, :, rows, choices]  # (n, K+1, n, K+1)
            terms = terms[:, 1:] - terms[:, :1]
            pairs = (terms[..., 1:] - terms[..., :1]) * is_open[:, :, None, None] * is_open
        linear = (costs[rows, choices[:, 1:]] - costs[rows, choices[:, :1]]) * is_open
        unit = max(float(np.abs(linear).max(initial=0)), float(np.abs(pairs).max(initial=0))) or 1.0
        saved, needed = [], []
        for table, excess, least in ((space.nbytes, space.bytes_of(base) - budget, 1),
                                     *((cost.values, -cost.room(base), 1e-300) for cost in limits)):
            below = (table[rows, choices[:, :1]] - table[rows, choices[:, 1:]]) * is_open
            size = max(float(np.abs(below).max(initial=0)), least)
            saved.append(below / size)
            needed.append(excess / size)
        return cls(choices, layers, base, is_open, float(estimate.score(base)[0]), unit,
                   np.where(is_open, linear / unit, _NEVER), pairs / unit, np.stack(saved), np.array(needed))

    def __len__(self) -> int:
        return len(self.layers)

    def pick(self, x: FloatArray) -> IntArray:
        """The pick (layers,) of a binary x (n, K); if x is fractional, each layer's choice with the largest share."""
        pick: IntArray = self.base.copy()
        pick[self.layers] = self.choices[np.arange(len(x)), self.shares(x).argmax(axis=1)]
        return pick

    def shares(self, x: FloatArray) -> FloatArray:
        """(n, K+1): the share of each choice in x, the widest open choice first."""
        return np.concatenate([1 - x.sum(axis=1, keepdims=True), x], axis=1)

    def least(self, costs: FloatArray) -> tuple[float, FloatArray]:
        """A lower bound on ``costs'x`` over the relaxed program, and (n, K+1) the increase of this bound if a layer
        takes each choice.

        Both come from the Lagrange dual in the prices of budget and limits, which is valid at any prices and exact at
        the best.
        """
        prices = np.array([self._price(costs)]) if len(self.needed) == 1 else self._prices(costs)
        reduced = np.pad(costs - np.tensordot(prices, self.saved, 1), ((0, 0), (1, 0)))
        lowest = reduced.min(axis=1)
        rounding = 1e-14 * (len(costs) * float(prices.sum()) + np.abs(lowest).sum())
        return float(lowest.sum() + prices @ self.needed - rounding), reduced - lowest[:, None]

    def _price(self, costs: FloatArray) -> float:
        """The best price of a byte, if the budget is the only bound, by bisection."""
        rows, needed = np.arange(len(costs)), float(self.needed[0])
        costs, saved = (np.pad(table, ((0, 0), (1, 0))) for table in (costs, self.saved[0]))  # (n, K+1)

        def saves_too_little(price: float) -> bool:
            return bool(saved[rows, (costs - price * saved).argmin(axis=1)].sum() < needed - _ROUNDING)

        price = 0.0
        if saves_too_little(0.0):
            low, price = 0.0, 1.0
            while saves_too_little(price) and price < _NEVER:
                low, price = price, 2 * price
            while price - low > max(1e-13 * price, _FREE):
                middle = (low + price) / 2
                low, price = (middle, price) if saves_too_little(middle) else (low, middle)
        return price

    def _prices(self, costs: FloatArray) -> FloatArray:
        """The best prices (R,) of budget and limits: the dual of the linear program, in which what is not saved may be
        bought at ``_DEAR``, so that there are prices if no x fits."""
        from scipy import sparse
        from scipy.optimize import linprog

        n, at = len(costs), np.flatnonzero(self.open.ravel())
        count = len(self.needed)
        one_choice = sparse.csr_matrix((np.ones(len(at)), (at // self.open.shape[1], np.arange(len(at)))),
                                       shape=(n, len(at)))
        savings = -self.saved.reshape(count, -1)[:, at]
        found = linprog(np.concatenate([costs.ravel()[at], np.full(count, _DEAR)]), method="highs",
                        A_ub=sparse.bmat([[one_choice, None], [sparse.csr_matrix(savings), -sparse.eye(count)]]),
                        b_ub=np.concatenate([np.ones(n), -self.needed]))
        if found.status != 0:  # any prices are valid
            return np.zeros(count)
        prices: FloatArray = np.maximum(-found.ineqlin.marginals[n:], 0.0)
        return prices

    @cached_property
    def _row(self) -> tuple[FloatArray, float]:
        """One row ``(n, K), needed`` that budget and limits imply: their sum, weighted by the prices of the program
        without pair terms."""
        if len(self.needed) == 1:
            return self.saved[0], float(self.needed[0])
        prices = self._prices(np.where(self.open, self.linear, _NEVER))
        weights = prices / prices.max() if prices.max() > 0 else np.ones(len(prices))
        return np.tensordot(weights, self.saved, 1), float(weights @ self.needed)

    def nearest(self, point: FloatArray) -> FloatArray:
        """The projection of a point (n, K) onto the relaxed program; with limits, onto the x that satisfy the one row
        that budget and limits imply: a superset, of which every tangent is a bound as well."""
        from scipy.optimize import brentq

        saved, needed = self._row

        def missing(price: float) -> float:
            return needed - float((saved * _capped(point + price * saved)).sum())

        if missing(0.0) <= 0:
            return _capped(point)
        high = 1.0
        while missing(high) > 0 and high < _NEVER:
            high *= 2
        price = brentq(missing, 0.0, high, xtol=1e-12) if missing(high) <= 0 else high
        return _capped(point + price * saved)


@dataclass(frozen=True, eq=False)
class Tangent:
    """A lower bound ``constant + slope'x`` on the pair terms of every plan; ``slope`` is (n, K)."""

    slope: FloatArray
    constant: float

    def bound(self, program: Program) -> tuple[float, FloatArray]:
        """Lower bounds on the scores of all plans, and (n, K+1) of the plans with each choice."""
        least, increases = program.least(program.linear + self.slope)
        bound = program.constant + program.unit * (least + self.constant)
        return bound, bound + program.unit * increases


def relaxations(program: Program, rounds: int, close: float) -> Iterator[tuple[FloatArray, Tangent]]:
    """Optima (n, K) and tangents of successive convex relaxations.

    Bounds improve over several rounds, although a single round can give a smaller bound than the round before.

    The bound is concave in the shift S. Its gradient is ``-W / 2`` with ``W_i = diag(x_i) - x_i x_i'`` at the optimum x
    of the relaxation. Frank-Wolfe steps towards the shift of least ``<W, S>`` increase it.

    Args:
        program: the program.
        rounds: number of relaxations.
        close: tolerance of each optimum, in units of the program.
    """
    n, k = program.linear.shape
    if not program.pairs.any():
        yield np.zeros((n, k)), Tangent(np.zeros((n, k)), 0.0)
        return
    # A rank above sqrt(2 * constraints) is enough for the semidefinite optimum (Barvinok, Pataki).
    rank = max(k, int(np.sqrt(n * k * (k + 1))) + 1)
    random = np.random.default_rng(0).normal(size=(n, rank, k))
    vectors: FloatArray = np.linalg.qr(random)[0].transpose(0, 2, 1)
    point = program.nearest(np.full((n, k), 1 / (k + 1)))
    shift: FloatArray = np.zeros((n, k, k))
    for number in range(rounds):
        inner = (1 - 0.1 / (number + 1)) * point + 0.1 / (number + 1) / (k + 1)  # inside, so that W has an inverse
        covariances = inner[:, :, None] * (np.eye(k) - inner[:, None, :])  # W, (n, K, K)
        best, vectors = _least_shift(program, covariances, vectors)
        shift = shift + (best - shift) * (2 / (number + 2))
        matrix = program.pairs.reshape(n * k, n * k) + _diagonal(shift)  # P + S
        linear = program.linear - np.einsum("ikk->ik", shift) / 2
        point = _minimum(program, matrix, linear, point, close)
        gradient = matrix @ point.ravel()  # of x'(P + S)x / 2
        rounding = _ROUNDING * float(np.abs(matrix).sum() + np.abs(linear[program.open]).sum())
        yield point, Tangent(gradient.reshape(n, k) - np.einsum("ikk->ik", shift) / 2,
                             -0.5 * float(gradient @ point.ravel()) - rounding)


def _least_shift(program: Program, covariances: FloatArray, vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The shift S (n, K, K) of nearly least ``<W, S>`` with ``P + S`` positive semidefinite, W being the covariances.

    Also returns the vectors (n, K, rank) from which the next call starts.

    The dual problem is ``min <P, VV'>`` with ``V_i V_i' = W_i``. It is solved by coordinate descent over the
    blocks (the mixing method, Wang, Chang, Kolter 2017, with ``V_i = W_i^(1/2) U_i`` and orthonormal rows in
    U_i). If ``P + S`` still has a negative eigenvalue, the shift grows by its amount.
    """
    n, k = program.linear.shape
    values, axes = np.linalg.eigh(covariances)
    root, inverse = ((axes * scale[:, None]) @ axes.transpose(0, 2, 1) for scale in (values**0.5, values**-0.5))
    scaled = np.einsum("iab,ibjc,jcd->iajd", root, program.pairs, root, optimize=True).reshape(n, k, n * k)
    flat: Any = vectors.reshape(n * k, -1).copy()  # U
    for _ in range(_SWEEPS):
        before = flat.copy()
        for i in range(n):
            left, _, right = np.linalg.svd(scaled[i] @ flat, full_matrices=False)
            flat[i * k:(i + 1) * k] = -left @ right
        if np.abs(flat - before).max() < 1e-4:
            break
    left, size, _ = np.linalg.svd((scaled.reshape(n * k, n * k) @ flat).reshape(n, k, -1), full_matrices=False)
    shift = (left * size[:, None]) @ left.transpose(0, 2, 1)
    spectrum = np.linalg.eigvalsh(scaled.reshape(n * k, n * k) + _diagonal(shift))
    shift = shift + (max(-spectrum[0], 0.0) + _ROUNDING * spectrum[-1]) * np.eye(k)
    shift = inverse @ shift @ inverse
    return (shift + shift.transpose(0, 2, 1)) / 2, flat.reshape(vectors.shape)


def _minimum(program: Program, matrix: FloatArray, linear: FloatArray, start: FloatArray, close: float) -> FloatArray:
    """The minimum (n, K) of ``linear'x + x' matrix x / 2`` over the relaxed program, by accelerated projected gradients
    (FISTA, Beck, Teboulle 2009) with restarts (O'Donoghue, Candès 2015)."""
    def gradient(x: FloatArray) -> FloatArray:
        result: FloatArray = linear + (matrix @ x.ravel()).reshape(x.shape)
        return result

    step_size = 1 / max(float(np.linalg.eigvalsh(matrix)[-1]), 1e-2)
    x = extrapolated = start
    momentum = 1.0
    for step in range(1, 301):
        projected = program.nearest(extrapolated - step_size * gradient(extrapolated))
        if ((extrapolated - projected) * (projected - x)).sum() > 0:
            momentum = 1.0
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        extrapolated = projected + (momentum - 1) / next_momentum * (projected - x)
        x, momentum = projected, next_momentum
        # The duality gap of the linearised program bounds the error of the minimum.
        if step % 20 == 0 and (gradient(x) * x).sum() - program.least(gradient(x))[0] <= close:
            break
    return x


def _diagonal(blocks: FloatArray) -> FloatArray:
    """The block-diagonal matrix (n K, n K) of blocks (n, K, K)."""
    n, k = blocks.shape[:2]
    whole = np.zeros((n, k, n, k))
    whole[np.arange(n), :, np.arange(n)] = blocks
    return whole.reshape(n * k, n * k)


def _capped(point: FloatArray) -> FloatArray:
    """The projection of a point (n, K) onto ``x >= 0`` with row sums of at most 1."""
    clipped = np.maximum(point, 0.0)
    exceeds = clipped.sum(axis=1) > 1
    if exceeds.any():  # these rows are projected onto the simplex
        rows = point[exceeds]
        ordered = -np.sort(-rows, axis=1)
        excess = (ordered.cumsum(axis=1) - 1) / np.arange(1, rows.shape[1] + 1)
        positive = (ordered > excess).sum(axis=1)
        clipped[exceeds] = np.maximum(rows - excess[np.arange(len(rows)), positive - 1][:, None], 0.0)
    return clipped
