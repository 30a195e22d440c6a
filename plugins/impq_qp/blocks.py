"""Exact plans if layers interact within small parts only, such as blocks: enumeration, then one knapsack over parts.

Within a part every combination of choices is scored, and those on the front of bytes and score are kept. A knapsack
takes one combination of each part. It is solved by dynamic programming over the parts, with sums that a Lagrangian
bound excludes, or that other sums dominate, left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from impq_core.greedy import promote
from impq_core.space import FloatArray, IntArray
from impq_core.types import SensitivityEstimate

COMBINATIONS = 100_000
"""Largest number of combinations of a part that are enumerated."""

_SUMS = 1_000_000
"""Largest number of sums that are kept."""


@dataclass(frozen=True, eq=False)
class Part:
    """Layers that interact with no other layer, and their best combinations, from wide to narrow.

    Args:
        layers: (p,), their numbers.
        picks: (F, p), the combinations that no other has both fewer bytes and a lower score than.
        nbytes: (F,), falling.
        scores: (F,), rising.
    """

    layers: IntArray
    picks: IntArray
    nbytes: IntArray
    scores: FloatArray


def parts_of(estimate: SensitivityEstimate) -> list[Part] | None:
    """The parts of a program; None if one has more than ``COMBINATIONS`` combinations, or the estimate no pairs."""
    if estimate.pairwise is None:
        return None
    n, m = estimate.space.nbytes.shape
    linked = np.abs(estimate.pairwise).max(axis=(1, 3)) > 0
    groups: list[IntArray] = []
    left = np.ones(n, dtype=bool)
    while left.any():
        members = np.zeros(n, dtype=bool)
        members[left.argmax()] = True
        while (grown := members | linked[members].any(axis=0)).sum() > members.sum():
            members = grown
        groups.append(np.flatnonzero(members))
        left &= ~members
    if max(len(group) for group in groups) * np.log(m) > np.log(COMBINATIONS):
        return None
    return [_front(estimate, group) for group in groups]


def _front(estimate: SensitivityEstimate, layers: IntArray) -> Part:
    assert estimate.pairwise is not None
    m = len(estimate.space.choices)
    picks = np.stack(np.unravel_index(np.arange(m**len(layers)), (m,) * len(layers)), axis=1)  # (C, p)
    nbytes = estimate.space.nbytes[layers, picks].sum(axis=1)
    scores = estimate.linear[layers, picks].sum(axis=1)
    for a in range(len(layers)):
        for b in range(a):
            scores = scores + estimate.pairwise[layers[a], picks[:, a], layers[b], picks[:, b]]
    kept = _undominated(nbytes, scores)[::-1]
    return Part(layers, picks[kept], nbytes[kept], scores[kept])


def _undominated(nbytes: IntArray, scores: FloatArray) -> IntArray:
    """Rows that no other has as few bytes and as low a score as, from few bytes to many."""
    order = np.lexsort((scores, nbytes))
    least = np.minimum.accumulate(scores[order])
    rows: IntArray = order[np.concatenate([[True], scores[order][1:] < least[:-1]])]
    return rows


def solve_parts(estimate: SensitivityEstimate, budget: int, parts: Sequence[Part]) -> IntArray | None:
    """The pick (n,) of least score within a budget in bytes, proven; None if more than a million sums remain.

    Args:
        estimate: the estimate; the smallest plan fits the budget.
        budget: bytes, pinned layers included.
        parts: all parts.
    """
    room = budget - estimate.space.fixed_bytes
    price = _price(parts, room)
    reduced = [part.scores + price * part.nbytes for part in parts]
    least = sum(float(costs.min()) for costs in reduced) - price * room  # no pick within the budget scores less
    known = _at_price(parts, price, room)
    pick = promote(estimate, budget)
    value = min(float(estimate.score(pick)[0]), float(known))
    slack = value - least + 1e-9 * (abs(value) + sum(float(np.abs(part.scores).max()) for part in parts))
    after = np.concatenate([np.cumsum([int(part.nbytes.min()) for part in parts][::-1])[::-1][1:], [0]])
    nbytes, scores, excess = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    kept: list[tuple[IntArray, IntArray]] = []  # of each sum: the sum before, and the combination of the part
    for part, costs, rest in zip(parts, reduced, after, strict=True):
        worse = costs - costs.min()
        fits = np.flatnonzero(worse <= slack)
        total = (excess[:, None] + worse[fits]).ravel()
        size = (nbytes[:, None] + part.nbytes[fits]).ravel()
        rows = np.flatnonzero((total <= slack) & (size + rest <= room))
        score = (scores[:, None] + part.scores[fits]).ravel()
        rows = rows[_undominated(size[rows], score[rows])]
        if len(rows) > _SUMS:
            return None
        kept.append((rows // len(fits), fits[rows % len(fits)]))
        nbytes, scores, excess = size[rows], score[rows], total[rows]
    at = int(scores.argmin())
    best = np.zeros(len(estimate.space), dtype=np.int64)
    for part, (before, combination) in zip(reversed(parts), reversed(kept), strict=True):
        best[part.layers] = part.picks[combination[at]]
        at = int(before[at])
    return best


def _chosen(parts: Sequence[Part], price: float) -> list[int]:
    """The cheapest combination of each part at a price of a byte; among equals the smallest."""
    return [len(part.scores) - 1 - int((part.scores + price * part.nbytes)[::-1].argmin()) for part in parts]


def _size(parts: Sequence[Part], chosen: Sequence[int]) -> int:
    return sum(int(part.nbytes[k]) for part, k in zip(parts, chosen, strict=True))


def _price(parts: Sequence[Part], room: int) -> float:
    """The least price of a byte, to rounding, at which the cheapest combinations fit."""
    if _size(parts, _chosen(parts, 0.0)) <= room:
        return 0.0
    low, high = 0.0, max(float(np.ptp(part.scores)) for part in parts) or 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _size(parts, _chosen(parts, middle)) <= room else (middle, high)
    return high


def _at_price(parts: Sequence[Part], price: float, room: int) -> float:
    """The score of a pick that fits: the cheapest combinations at a price, improved part by part in what room is
    left."""
    chosen = _chosen(parts, price)
    left = room - _size(parts, chosen)
    if left < 0:
        return np.inf
    score = 0.0
    for part, k in zip(parts, chosen, strict=True):
        better = int(np.flatnonzero(part.nbytes <= part.nbytes[k] + left)[0])  # the widest that fits
        left -= int(part.nbytes[better] - part.nbytes[k])
        score += float(part.scores[better])
    return score
