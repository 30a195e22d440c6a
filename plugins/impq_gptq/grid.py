"""Scales and zeros of groups of weights, before GPTQ rounds them.

The range of a group is that of its weights and zero. ``min_max`` takes it as it is. ``weight_error`` is the clip search
of gptqmodel 7.6, the reference in the tests: it shrinks the range to the share with the least squared error of the
weights. ``hessian_error`` counts the error of a column c as GPTQ's objective does (arXiv 2210.17323, equation 2):
divided by the squared diagonal element V_cc, see ``impq_gptq.solver``, which is the loss that is left after the columns
behind c were corrected. It searches scales and whole zeros together, and then fits the scale to the codes by least
squares.

Bits: only operations on single elements and trees of them, so that a row's bits do not depend on the other rows.
"""

from __future__ import annotations

import torch

SHRINKS = tuple(1 - step / 100 for step in range(80))
"""Shares of a group's range that the clip search tries."""

SHARES = tuple(1.2 - step / 20 for step in range(17))
"""Shares of a group's range that ``hessian_error`` tries; above 1 because a zero that leaves the middle of the codes
needs a larger step for the longer side."""

FITS = 2
"""Fits of the scale to the codes by least squares. Afterwards the codes are found again."""


def ranges(weights: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and highest value (groups, rows) of weights (groups, group size, rows), zero included; -1 and 1 for a
    group of zeros."""
    low, high = weights.amin(1).clamp_(max=0), weights.amax(1).clamp_(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    return low.masked_fill_(empty, -1), high.masked_fill_(empty, 1)


def min_max(weights: torch.Tensor, tops: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """Scales and zeros (2, groups, rows) of the whole range.

    Args:
        weights: (groups, group size, rows).
        tops: (rows,), the largest codes.
        symmetric: zeros are the middle of the codes.
    """
    low, high = ranges(weights, symmetric)
    scales = (high - low) / tops
    return torch.stack([scales, ((tops + 1) / 2).expand_as(scales) if symmetric else (-low / scales).round()])


def weight_error(weights: torch.Tensor, tops: torch.Tensor, symmetric: bool, narrow: bool) -> torch.Tensor:
    """Scales and zeros (2, groups, rows) with the least squared error of the weights. At 2 bits the search also tries
    the other whole number beside the exact zero.

    Args:
        weights: (groups, group size, rows).
        tops: (rows,), the largest codes.
        symmetric: zeros are the middle of the codes.
        narrow: whether any row has 2 bits.
    """
    low, high = ranges(weights, symmetric)
    shrinks = torch.tensor(SHRINKS, device=weights.device)[:, None, None]
    scales = (shrinks * high - shrinks * low) / tops
    if symmetric:
        zeros = ((tops + 1) / 2).expand_as(scales)[None]
    else:
        exact = -(shrinks * low) / scales
        zeros = exact.round()[None]
        if narrow:
            floor, ceiling = exact.floor().clamp_(0), torch.minimum(exact.ceil(), tops)
            zeros = torch.cat([zeros, torch.where(zeros == floor, ceiling, floor)])
    return _least(weights, scales, zeros, tops)


def _least(weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, tops: torch.Tensor) -> torch.Tensor:
    """Of candidates, the scales and zeros (2, groups, rows) with the least squared error; the first of equal ones.

    Args:
        weights: (groups, group size, rows).
        scales: candidates (shrinks, groups, rows).
        zeros: candidates (1 or 2, shrinks, groups, rows); the second is for rows with 2 bits.
        tops: (rows,), the largest codes.
    """
    lowest, highest = ([part[:, :, None].unbind() for part in bound.unbind()] for bound in (-zeros, tops - zeros))
    errors = scales.new_empty(len(scales), len(zeros), *scales.shape[1:])
    exact, rounded, error = (torch.empty_like(weights) for _ in range(3))
    pairs = additions(error)
    for step, inverse in enumerate((1 / scales)[:, :, None].unbind()):
        torch.mul(weights, inverse, out=exact)
        torch.round(exact, out=rounded)
        for kind in range(len(zeros)):
            torch.clamp(rounded, lowest[kind][step], highest[kind][step], out=error)
            error.sub_(exact)
            error.mul_(error)
            for total, part in pairs:
                total.add_(part)
            errors[step, kind] = error[:, 0]
    errors.mul_(scales[:, None].square())
    if len(zeros) == 2:
        errors[:, 1].masked_fill_(tops != 3, torch.inf)
    best = errors.flatten(0, 1).argmin(0, keepdim=True)
    return torch.cat([scales.gather(0, best // len(zeros)), zeros.transpose(0, 1).flatten(0, 1).gather(0, best)])


def hessian_error(weights: torch.Tensor, importance: torch.Tensor, tops: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """Scales and zeros (2, groups, rows) with the least sum of ``importance`` times squared error.

    Zeros are searched beside the one of the range: the best one is among its neighbours (at 2 bits, where these are
    nearly all, a search over every zero found the same grids).

    Args:
        weights: (groups, group size, rows).
        importance: (groups, group size, 1), positive.
        tops: (rows,), the largest codes.
        symmetric: zeros are the middle of the codes.
    """
    low, high = ranges(weights, symmetric)
    span = (high - low) / tops
    search = _Search(weights, importance, span)
    middle = (tops + 1) / 2
    for share in SHARES:
        scales = share * span
        if symmetric:
            zeros = [middle.expand_as(scales)]
        else:
            nearest = (-low / span).round()
            zeros = [nearest, (nearest - 1).clamp_(0), torch.minimum(nearest + 1, tops)]
        search.visit(scales, zeros, tops)
    for _ in range(FITS):
        search.visit(search.fitted(tops), [search.zeros.clone()], tops)
    return torch.stack([search.scales, search.zeros])


class _Search:
    """The best grid so far of each group and row; of equal ones the first.

    Args:
        weights: (groups, group size, rows).
        importance: (groups, group size, 1).
        scales: (groups, rows), of a grid before the first visit.
    """

    def __init__(self, weights: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor) -> None:
        self._weights, self._importance = weights, importance
        self.scales, self.zeros = scales.clone(), torch.zeros_like(scales)
        self._least = torch.full_like(scales, torch.inf)
        self._exact, self._rounded, self._error = (torch.empty_like(weights) for _ in range(3))
        self._additions = additions(self._error)

    def visit(self, scales: torch.Tensor, zeros: list[torch.Tensor], tops: torch.Tensor) -> None:
        """Keep the scales (groups, rows) with one of the zeros where that is the best so far."""
        torch.mul(self._weights, (1 / scales)[:, None], out=self._exact)
        torch.round(self._exact, out=self._rounded)
        squares = scales.square()
        for zero in zeros:
            torch.clamp(self._rounded, -zero[:, None], (tops - zero)[:, None], out=self._error)
            self._error.sub_(self._exact)
            self._error.mul_(self._error).mul_(self._importance)
            error = self._sum().mul(squares)
            better = error < self._least
            torch.where(better, error, self._least, out=self._least)
            torch.where(better, scales, self.scales, out=self.scales)
            torch.where(better, zero, self.zeros, out=self.zeros)

    def fitted(self, tops: torch.Tensor) -> torch.Tensor:
        """The scales (groups, rows) with the least error for the codes of the best grids."""
        codes = (self._weights / self.scales[:, None]).round_()
        codes = torch.clamp(codes, -self.zeros[:, None], (tops - self.zeros)[:, None]).contiguous()
        weighted = codes * self._importance
        torch.mul(weighted, self._weights, out=self._error)
        above = self._sum().clone()
        torch.mul(weighted, codes, out=self._error)
        scales = above / self._sum()
        return torch.where(scales > 0, scales, self.scales)  # NaN is not: all codes are zero

    def _sum(self) -> torch.Tensor:
        for total, part in self._additions:
            total.add_(part)
        return self._error[:, 0]


def additions(values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of views of values (..., n, rows). If the second of each pair is added to the first, in this order, the
    sums over n stand at 0. The order in which ``torch.sum`` adds depends on a row's position."""
    pairs, count = [], values.shape[-2]
    while count > 1:
        half = (count + 1) // 2
        pairs.append((values[..., :count - half, :], values[..., half:count, :]))
        count = half
    return pairs
