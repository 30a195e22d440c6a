"""GPTQ (arXiv 2210.17323): one sweep over the columns for all linears that share inputs, at all their widths.

The columns of a weight are rounded one after another. The rounding error of a column is spread over the columns that
are left, in proportion to a row of V, where V is upper triangular and VT V is the inverse of the damped Hessian of the
inputs (the paper's Cholesky reformulation). V depends neither on the weight nor on the width, so that one V and
one loop serve every linear and width. The algorithm is that of gptqmodel 7.6, the reference in the tests: its order of
columns (group-aware reordering, arXiv 2505.14638), grids that are fixed at the start of a block of columns, and, if it
is asked for, its search of grids; see ``impq_gptq.grid``. V is computed from one Cholesky factor of the reversed
Hessian; gptqmodel factors twice, which is slower and rounds differently.

**Bits.** What is computed for a linear at a width does not depend on the other linears and widths of the sweep. Rows
are worked on together by operations on single elements only, each of which is rounded by itself (a fused product and
sum rounds the vector part of a loop and its rest differently on some processors); sums are trees of such operations;
and matrix products are made for each linear and width by themselves, because a product's bits may depend on its number
of rows.

**Memory**, in bytes beside the weights and the gram given, with C columns and R rows, summed over linears and widths:
8 C^2 while the Hessian is factored, and 20 C^2 with a drift; then at most 4 C^2 (8 C^2 with GPTAQ) + 5 C R
+ 8 max(128, group size) R, and 20 MB on a CPU or 500 MB elsewhere for the chunk at work.

**Devices.** Everything runs on the device of the weights. Inside the loop over columns nothing waits for the device.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from impq_gptq import grid
from impq_gptq.drift import gptaq, qep
from impq_gptq.grid import additions

BLOCK = 128
"""Columns between two updates of the columns to the right by a matrix product."""

CPU_CHUNK, DEVICE_CHUNK = 2**17, 2**22
"""Weights whose grids and codes are found together: on a CPU few enough for its cache, elsewhere as many as keep the
device busy."""

DAMPING_STEP = 0.01
"""Step by which the damping is raised until the Hessian can be factored."""


class NotPositiveDefinite(Exception):
    """The Hessian cannot be factored, even with the largest damping."""


@dataclass(frozen=True, eq=False)
class Job:
    """A linear at a width.

    Args:
        weight: (rows, columns), of any floating point type; not changed.
        bits: bits of a code.
    """

    weight: torch.Tensor
    bits: int


@dataclass(frozen=True, eq=False)
class Solution:
    """The quantized weight of a job is (code - zero) * scale. Its tensors are on the weight's device.

    Args:
        codes: uint8 (columns, rows).
        scales: float32 (groups, rows).
        zeros: float32 (groups, rows), whole numbers.
        loss: sum over weights of the squared rounding error over the matching diagonal element of the inverse Hessian
            of the columns that were left, per token (equation 2 of the paper, summed).
        damping: the share of the Hessian's mean diagonal that was added to it.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    loss: float
    damping: float


@dataclass(frozen=True)
class Settings:
    """How to quantize; see the backend's options of the same names.

    Args:
        correction: ``none``, ``gptaq`` or ``qep``.
        strength: alpha of the correction.
    """

    group_size: int
    symmetric: bool
    group_aware: bool
    grid: str
    damping: float
    correction: str = "none"
    strength: float = 0.0


@torch.no_grad()
def sweep(jobs: Sequence[Job], gram: torch.Tensor | None, tokens: int, settings: Settings,
          drift: torch.Tensor | None = None) -> list[Solution]:
    """Quantize linears that share their inputs.

    Args:
        jobs: what to quantize; all weights have the same columns and device, and groups divide the columns.
        gram: float32 (columns, columns), the sum of x xT over tokens, on the device of the weights; not changed. None
            is the identity as Hessian, which makes GPTQ plain rounding.
        tokens: number of inputs in the sum, at least 1.
        settings: how to quantize.
        drift: float32 (columns, columns), the sum of (x_fp - x) xT over the same tokens; None for no drift.

    Returns:
        A solution for each job.

    Raises:
        NotPositiveDefinite: the Hessian cannot be factored.
    """
    columns, device = jobs[0].weight.shape[1], jobs[0].weight.device
    if gram is None:
        diagonal, dead = torch.ones(columns, device=device), None
    else:
        diagonal, dead = gram.diagonal() * (2 / tokens), gram.diagonal() == 0
        diagonal.masked_fill_(dead, 1)
    order, groups = _order(diagonal, settings)
    inverse, damping = _inverse_factor(gram, diagonal, order, 2 / tokens, settings.damping)
    pull = None
    if drift is not None and gram is not None and settings.correction == "gptaq":
        pull = gptaq(drift, inverse, order, settings.strength * 2 / tokens)
    elif drift is not None and gram is not None and settings.correction == "qep":
        moves = qep(drift, gram, settings.strength)
        jobs = [replace(job, weight=torch.addmm(job.weight.float(), job.weight.float(), moves)) for job in jobs]
    # Rows of one width are neighbours, so that a chunk of rows has one width.
    ranked = sorted(range(len(jobs)), key=lambda number: jobs[number].bits)
    rows = _Rows([jobs[number] for number in ranked], order, dead, inverse.diagonal().flip(0), settings)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        # The rows of V in this block, from column ``start`` on.
        rows.round(start, stop, inverse[columns - stop:columns - start, :columns - start].flip(0, 1), groups,
                   None if pull is None else pull[start:stop, start:])
    solutions = dict(zip(ranked, rows.solutions(tokens, damping), strict=True))
    return [solutions[number] for number in range(len(jobs))]


def guided_sweep(jobs: Sequence[Job], grams: torch.Tensor, tokens: int, settings: Settings) -> list[Solution]:
    """Quantize linears, each group of rows with a Hessian of its own (GuidedQuant, arXiv 2505.07004, algorithm 1).

    Args:
        jobs: what to quantize; see ``sweep``.
        grams: float32 (row groups, columns, columns), the weighted sum of x xT of each group of rows.
        tokens: number of inputs in the sums.
        settings: how to quantize.

    Returns:
        A solution for each job; its loss is the sum of those of the groups, its damping the largest of theirs.

    Raises:
        NotPositiveDefinite: a Hessian cannot be factored.
    """
    parts = [sweep([replace(job, weight=job.weight.tensor_split(len(grams))[group]) for job in jobs], gram, tokens,
                   settings) for group, gram in enumerate(grams)]
    return [Solution(*(torch.cat([getattr(part, name) for part in of_job], dim=1)
                       for name in ("codes", "scales", "zeros")), math.fsum(part.loss for part in of_job),
                     max(part.damping for part in of_job)) for of_job in zip(*parts, strict=True)]


def _order(diagonal: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of columns (columns,) and that of groups (groups,) for a diagonal (columns,) of the Hessian.

    Group-aware: groups in descending order of their largest element, and columns within a group of their own."""
    if not settings.group_aware:
        columns = torch.arange(len(diagonal), device=diagonal.device)
        return columns, columns[:len(columns) // settings.group_size]
    table = diagonal.view(-1, settings.group_size)
    within = table.argsort(dim=1, descending=True, stable=True)
    groups = table.amax(1).argsort(descending=True, stable=True)
    first = settings.group_size * torch.arange(len(groups), device=diagonal.device)
    return (within + first[:, None])[groups].flatten(), groups


def _inverse_factor(gram: torch.Tensor | None, diagonal: torch.Tensor, order: torch.Tensor, factor: float,
                    damping: float) -> tuple[torch.Tensor, float]:
    """L^-1 (columns, columns), where L is the lower Cholesky factor of the damped Hessian with its columns in reversed
    order, and the damping used. V of the module's docstring is L^-1 with rows and columns reversed.

    Never more than two tensors of the Hessian's size exist beside the gram.

    Args:
        gram: see ``sweep``.
        diagonal: (columns,) of the Hessian, in the order of the weight.
        order: (columns,) of the columns.
        factor: the Hessian is this times the gram.
        damping: the least share of the mean diagonal that is added to the diagonal.
    """
    backwards = order.flip(0)
    identity = functools.partial(torch.eye, len(order), device=order.device)
    lower, damping = _damped_factor(
        identity() if gram is None else gram.index_select(0, backwards).index_select(1, backwards).mul_(factor),
        diagonal[backwards], damping)
    inverse = identity()
    return torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse), damping


def _damped_factor(hessian: torch.Tensor, diagonal: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The lower Cholesky factor of a Hessian, which is overwritten, and the share of the mean of its diagonal that was
    added: the damping, or the least share on a grid above it that is enough."""
    shares = [damping + step * DAMPING_STEP for step in range(math.ceil((1 - damping) / DAMPING_STEP))]

    def factor(share: float) -> torch.Tensor | None:
        hessian.diagonal().copy_(diagonal + share * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(hessian)
        return None if failed else lower

    lower = factor(damping)
    if lower is None:  # every share above one that is enough is enough too
        least = bisect_left(shares, True, key=lambda share: factor(share) is not None)
        if least == len(shares):
            raise NotPositiveDefinite
        damping = shares[least]
        lower = factor(damping)
    assert lower is not None
    return lower, damping


class _Rows:
    """The rows of all jobs while their columns are rounded.

    A job's weights and results are tensors of its own. A block of columns is copied into one tensor with the rows of
    all jobs. Weights are stored transposed, so that a column's elements are neighbours.

    Args:
        jobs: in ascending order of bits.
        order: (columns,) of the columns.
        dead: bool (columns,), the columns that no input reaches, in the order of the weight. They are set to zero.
        diagonal: (columns,) of V.
        settings: how to quantize.
    """

    def __init__(self, jobs: Sequence[Job], order: torch.Tensor, dead: torch.Tensor | None, diagonal: torch.Tensor,
                 settings: Settings) -> None:
        self._settings, self._order, self._jobs = settings, order, jobs
        self._importance = diagonal.pow(-2)
        self._device = order.device
        self._weights = []
        for job in jobs:
            weight = job.weight.float().T.index_select(0, order)
            self._weights.append(weight if dead is None else weight.masked_fill_(dead[order][:, None], 0))
        self._codes = [torch.empty_like(weight, dtype=torch.uint8) for weight in self._weights]
        groups = len(order) // settings.group_size
        self._grids = [weight.new_empty(2, groups, weight.shape[1]) for weight in self._weights]  # scales and zeros
        self._sizes = [weight.shape[1] for weight in self._weights]
        self._tops = torch.cat([torch.full((size,), 2.0**job.bits - 1, device=self._device)
                                for job, size in zip(jobs, self._sizes, strict=True)])
        self._losses = torch.zeros_like(self._tops)

    def round(self, start: int, stop: int, inverse: torch.Tensor, groups: torch.Tensor,
              pull: torch.Tensor | None) -> None:
        """Round the columns from ``start`` to ``stop``, and correct those behind.

        Args:
            start: the first column, a multiple of ``BLOCK``.
            stop: behind the last column.
            inverse: (stop - start, columns - start), the rows of V, from column ``start`` on.
            groups: (groups,), the number that each group has in the weight.
            pull: (stop - start, columns - start), the rows of P, from column ``start`` on.
        """
        size, count = self._settings.group_size, stop - start
        begins = start % size == 0
        numbers = groups[start // size:max(start // size + 1, stop // size)]
        end = max(stop, start + size) if begins else stop
        stacked = torch.cat([weight[start:end] for weight in self._weights], dim=1)
        if begins:
            grids = stacked.new_empty(2, len(numbers), stacked.shape[1])
        else:
            grids = torch.cat([grid[:, numbers] for grid in self._grids], dim=2)
        codes = torch.empty_like(stacked[:count], dtype=torch.uint8)
        diagonal = inverse.diagonal()[:, None]
        scaled = inverse[:, :count] / diagonal
        inside = None if pull is None else pull[:, :count].contiguous()
        pulled = None if pull is None else torch.empty_like(stacked[:count])
        for chunk, narrow in self._chunks(end - start):
            block, tops = stacked[:, chunk].clone(memory_format=torch.contiguous_format), self._tops[chunk]
            if begins:
                grids[..., chunk] = self._grid(block.view(len(numbers), -1, block.shape[1]),
                                               self._importance[start:end].view(len(numbers), -1, 1), tops, narrow)
            scales, zeros = grids[..., chunk].contiguous()
            before = None if pulled is None else torch.empty_like(block[:count])
            errors, codes[:, chunk] = _columns(block[:count], scaled, scales, zeros, tops, inside, before)
            if pulled is not None:
                pulled[:, chunk] = before
            stacked[:count, chunk] = errors.div_(diagonal)
            errors.mul_(errors)
            for total, part in additions(errors):
                total.add_(part)
            self._losses[chunk] += errors[0]
        at = 0
        for weight, code, own_grid, rows in zip(self._weights, self._codes, self._grids, self._sizes, strict=True):
            own = slice(at, at + rows)
            code[self._order[start:stop]] = codes[:, own]
            own_grid[:, numbers] = grids[..., own]
            # Contiguous, and a product for this job alone, so that its bits are those of a sweep of this job alone.
            weight[stop:].addmm_(inverse[:, count:].T, stacked[:count, own].contiguous(), alpha=-1)
            if pull is not None and pulled is not None:
                weight[stop:].addmm_(pull[:, count:].T, pulled[:, own].contiguous())
            at += rows

    def solutions(self, tokens: int, damping: float) -> Iterator[Solution]:
        """The results, in the order of the jobs."""
        losses = self._losses.split(self._sizes)
        for codes, found, loss in zip(self._codes, self._grids, losses, strict=True):
            # An exactly rounded sum has the same bits for any number of threads.
            yield Solution(codes, found[0], found[1], math.fsum(loss.tolist()) / 2 / tokens, damping)

    def _chunks(self, span: int) -> Iterator[tuple[slice, bool]]:
        """Ranges of rows that are worked on together, with ``span`` columns, and whether any of them has 2 bits."""
        bits = [job.bits for job, size in zip(self._jobs, self._sizes, strict=True) for _ in range(size)]
        if self._device.type == "cpu":  # rows of one width, because only those with 2 bits have twice the candidates
            most, cuts = CPU_CHUNK // span, [bits.index(width) for width in sorted(set(bits))]
        else:
            most, cuts = DEVICE_CHUNK // span, [0]
        most = max(32, most // 32 * 32)
        for first, behind in itertools.pairwise([*cuts, len(bits)]):
            for start in range(first, behind, most):
                yield slice(start, min(start + most, behind)), bits[start] == 2

    def _grid(self, weights: torch.Tensor, importance: torch.Tensor, tops: torch.Tensor,
              narrow: bool) -> torch.Tensor:
        """Scales and zeros (2, groups, rows) of weights (groups, group size, rows), which are not changed."""
        symmetric = self._settings.symmetric
        match self._settings.grid:
            case "min-max":
                return grid.min_max(weights, tops, symmetric)
            case "weight-error":
                return grid.weight_error(weights, tops, symmetric, narrow)
            case _:
                return grid.hessian_error(weights, importance, tops, symmetric)


def _columns(weights: torch.Tensor, inverse: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor,
             tops: torch.Tensor, pull: torch.Tensor | None,
             before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round columns one after another, and spread each one's error over those behind it.

    Args:
        weights: (count, rows), the columns; overwritten.
        inverse: (count, count), their part of V, with each row divided by its diagonal element.
        scales: (groups, rows), of the columns' groups, which have the same number of columns here.
        zeros: (groups, rows).
        tops: (rows,), the largest codes.
        pull: (count, count), their part of P, if there is a drift.
        before: (count, rows), takes the columns as they are before they are rounded, if there is a drift.

    Returns:
        Errors (count, rows), and codes float32 (count, rows).
    """
    codes = torch.empty_like(weights)
    lowest, highest, steps = (-zeros).unbind(), (tops - zeros).unbind(), scales.unbind()
    factors, size = inverse[:, :, None].unbind(), len(weights) // len(scales)
    pulls = None if pull is None else pull[:, :, None].unbind()
    for column, (weight, code) in enumerate(zip(weights.unbind(), codes.unbind(), strict=True)):
        group = column // size
        torch.div(weight, steps[group], out=code)
        torch.clamp(code.round_(), lowest[group], highest[group], out=code)
        if pulls is not None and before is not None:
            before[column] = weight
            weights[column + 1:].add_(pulls[column][column + 1:] * before[column])
        weight.sub_(code * steps[group])  # from here on the error
        weights[column + 1:].sub_(factors[column][column + 1:] * weight)
    codes.view(len(scales), size, -1).add_(zeros[:, None])
    return weights, codes
